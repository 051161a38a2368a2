// Figures of numbers by arm, with intervals and seeds, and of the load of experts by rank.
const ROW = 20;

function drawFigures() {
  const visible = name => arms.get(name)?.shown;
  byId('panels').replaceChildren(
    ...panels.map(panel => dotPanel(panel, panel.rows.filter(row => visible(row.arm)))),
    ...loads.map(panel => loadPanel(panel, panel.rows.filter(row => visible(row.arm)))));
  byId('panels').closest('section').hidden = !panels.length && !loads.length;
}

function figure(title, label, ...children) {
  return make('figure', {'aria-label': label}, make('figcaption', {}, ...title), ...children);
}

// Arms below each other: a point with its interval, and the seeds as open points.
function dotPanel({title, name}, rows) {
  const caption = [make('strong', {}, title), ' ', make('span', {class: 'quiet'}, name)];
  if (!rows.length) return figure(caption, title, make('p', {class: 'quiet'}, 'No arm is shown.'));
  const width = 420, left = 150, right = width - 14, top = 4;
  const bottom = top + ROW * rows.length, height = bottom + 24;
  const ends = rows.flatMap(({mean, half, seeds}) => [mean - (half || 0), mean + (half || 0), ...seeds]);
  let low = Math.min(...ends), high = Math.max(...ends);
  const same = low === high;
  const room = 0.04 * (high - low) || Math.abs(low) * 0.05 || 0.1;
  [low, high] = [low >= 0 && low < room ? 0 : low - room, high + room];
  const x = scale(low, high, left + 6, right, false);
  const svg = make('svg', {viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': title});
  // All values alike say no more of an axis than where they are.
  for (const value of same ? [ends[0]] : ticks(low, high, false, 4)) {
    svg.append(make('line', {class: 'grid', x1: x(value), x2: x(value), y1: top, y2: bottom}),
      make('text', {x: x(value), y: bottom + 16, 'text-anchor': 'middle'}, show(value)));
  }
  rows.forEach(({arm, mean, half, seeds}, index) => {
    const y = top + ROW * (index + 0.5);
    const style = arms.get(arm).style;
    const said = `${arm}\n${show(mean)}${half ? ` \u00b1 ${show(half)}` : ''}\nseeds: ${show(seeds)}`;
    svg.append(make('g', {class: `dots ${style}`}, make('title', {}, said),
      make('rect', {x: 0, y: y - ROW / 2, width, height: ROW, class: 'row'}),
      make('text', {x: left, y: y + 4, 'text-anchor': 'end'}, shortened(arm, 24)),
      half ? make('path', {class: 'interval',
        d: `M${x(mean - half)} ${y}H${x(mean + half)}m0 -4v8M${x(mean - half)} ${y - 4}v8`}) : null,
      ...seeds.map(value => make('circle', {class: 'seed', cx: x(value), cy: y, r: 2.5})),
      make('circle', {class: 'mean', cx: x(mean), cy: y, r: 4})));
  });
  return figure(caption, title, svg);
}

// Experts from the most to the least loaded, along a line of one length for any number of them.
function loadPanel({layer, rows}, shown) {
  const title = `load of experts, MoE layer ${layer}`;
  const caption = [make('strong', {}, title), ' ', make('span', {class: 'quiet'},
    'by rank at the last step, in units of 1/E; dashed: balance')];
  if (!shown.length) return figure(caption, title, make('p', {class: 'quiet'}, 'No arm is shown.'));
  const width = 420, height = 250, left = 40, right = width - 14, top = 6, bottom = height - 40;
  // One scale whichever arms are shown, with room for intervals: up to E, where one has all.
  const end = ({mean, half}, rank) => Math.min(mean[rank] + (half[rank] || 0), mean.length);
  const high = Math.max(2, ...rows.flatMap(row => row.mean.map((_, rank) => end(row, rank))));
  const x = scale(0, 1, left, right, false), y = scale(0, high, bottom, top, false);
  const svg = make('svg', {viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': title});
  for (const value of ticks(0, high, false, 5)) {
    svg.append(make('line', {class: 'grid', x1: left, x2: right, y1: y(value), y2: y(value)}),
      make('text', {x: left - 6, y: y(value) + 4, 'text-anchor': 'end'}, show(value)));
  }
  svg.append(make('line', {class: 'balance', x1: left, x2: right, y1: y(1), y2: y(1)}),
    make('text', {x: left, y: bottom + 16}, 'most loaded'),
    make('text', {x: right, y: bottom + 16, 'text-anchor': 'end'}, 'least loaded'));
  for (const {arm, mean, half} of shown) {
    const at = rank => x((rank + 0.5) / mean.length);
    const limit = value => y(Math.min(Math.max(value, 0), high));
    const points = sign => mean.map((value, rank) =>
      `${at(rank).toFixed(1)} ${limit(value + sign * (half[rank] || 0)).toFixed(1)}`);
    const dead = mean.map((value, rank) => [value, rank]).filter(([value]) => value === 0);
    svg.append(make('g', {class: arms.get(arm).style}, make('title', {}, arm),
      half.some(Boolean) ? make('path', {class: 'band',
        d: `M${points(1).join('L')}L${points(-1).reverse().join('L')}Z`}) : null,
      make('path', {class: 'mean', d: `M${points(0).join('L')}`}),
      ...dead.map(([, rank]) => make('path', {class: 'cross',
        d: `M${at(rank) - 3} ${y(0) - 3}l6 6m0 -6l-6 6`}))));
  }
  return figure(caption, title, svg);
}

function shortened(arm, most) {
  const label = labels[arm] || arm;
  return label.length <= most ? label : `${label.slice(0, most - 1)}\u2026`;
}

// A table that is wider than its place gets smaller, or becomes a list of cards: nothing is cut.
function fitTables() {
  for (const place of document.querySelectorAll('.wide')) {
    const isCut = () => place.scrollWidth > place.clientWidth;
    place.classList.remove('cards', 'compact');
    if (isCut()) place.classList.add('compact');
    if (isCut()) place.classList.replace('compact', 'cards');
  }
}
