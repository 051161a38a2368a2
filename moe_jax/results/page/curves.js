// The plot of loss curves: drawn for the arms shown, read by pointer or arrow keys.
const MARGIN = {left: 52, right: 24, top: 8, bottom: 40};
// The first part of training, where all losses fall alike, does not set a linear scale.
const WARMUP_SHARE = 0.1;
let drawn = [];
let current = null;

function ticks(low, high, log, count) {
  if (log) {
    const all = [];
    for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++) {
      all.push(...[1, 2, 5].map(digit => Number(`${digit}e${power}`)));
    }
    const inside = all.filter(value => value >= low && value <= high);
    const tens = inside.filter(value => Number.isInteger(Math.log10(value)));
    if (inside.length > 2) return inside.length > count && tens.length > 1 ? tens : inside;
  }
  const rough = (high - low) / count;
  const ten = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(digit => digit * ten).find(value => value >= rough);
  const first = Math.ceil(low / step), last = Math.floor(high / step);
  return Array.from({length: last - first + 1}, (_, index) =>
    Number(((first + index) * step).toPrecision(10)));
}

function scale(low, high, from, to, log) {
  const map = log ? Math.log : value => value;
  const slope = (to - from) / (map(high) - map(low) || 1);
  return value => from + (map(value) - map(low)) * slope;
}

// Returns [lowest step, highest step, lowest loss, highest loss] of the axes.
function ranges(curves, log) {
  const settled = curves.filter(({record}) => record.status === FINISHED);
  const setting = settled.length ? settled : curves;
  const steps = curves.flatMap(({points}) => [points[0][0], points.at(-1)[0]]);
  const last = steps.reduce((a, b) => Math.max(a, b));
  const losses = setting.flatMap(({points}) =>
    points.filter(([step]) => log || step >= WARMUP_SHARE * last).map(([, loss]) => loss));
  const all = losses.length ? losses : setting.flatMap(({points}) => points.map(p => p[1]));
  const low = all.reduce((a, b) => Math.min(a, b)), high = all.reduce((a, b) => Math.max(a, b));
  const room = log ? 0.02 * low : 0.05 * (high - low) || 0.1;
  const first = log ? steps.reduce((a, b) => Math.min(a, b)) : 0;
  return [first, Math.max(last, first + 1), low - room, high + room];
}

function drawCurves() {
  const plot = byId('plot'), log = byId('log').checked;
  leave();
  const curves = [...arms.values()].filter(arm => arm.shown).flatMap(arm =>
    arm.trials.map(record => ({arm, record, points: record.curve.filter(([step, loss]) =>
      Number.isFinite(loss) && (!log || (step > 0 && loss > 0)))})))
    .filter(({points}) => points.length);
  drawn = [];
  if (!curves.length) {
    const some = records.some(record => record.curve.length);
    plot.replaceChildren(make('p', {class: 'quiet'},
      some ? 'No arm with a curve is shown.' : 'No trial has a curve.'));
    return;
  }
  const width = Math.max(plot.clientWidth, 280);
  const height = Math.round(Math.min(Math.max(0.45 * width, 260), 420));
  const right = width - MARGIN.right, bottom = height - MARGIN.bottom;
  const [x0, x1, y0, y1] = ranges(curves, log);
  const x = scale(x0, x1, MARGIN.left, right, log), y = scale(y0, y1, bottom, MARGIN.top, log);
  const svg = make('svg', {viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: 'group',
    'aria-label': `${curves.length} loss curves; arrow keys move along and between them`});
  for (const step of ticks(x0, x1, log, width / 110)) {
    svg.append(make('line', {class: 'grid', x1: x(step), x2: x(step), y1: MARGIN.top, y2: bottom}),
      make('text', {x: x(step), y: bottom + 16, 'text-anchor': 'middle'}, show(step)));
  }
  for (const loss of ticks(y0, y1, log, 6)) {
    svg.append(make('line', {class: 'grid', x1: MARGIN.left, x2: right, y1: y(loss), y2: y(loss)}),
      make('text', {x: MARGIN.left - 6, y: y(loss) + 4, 'text-anchor': 'end'}, show(loss)));
  }
  const middle = (MARGIN.top + bottom) / 2;
  svg.append(
    make('text', {x: right, y: height - 6, 'text-anchor': 'end'}, 'optimizer step'),
    make('text', {x: 12, y: middle, 'text-anchor': 'middle', transform: `rotate(-90 12 ${middle})`},
      'loss (nats per token)'));
  // What leaves the axes is cut off, except the cross at the end of an unfinished trial.
  const inner = make('svg', {x: 0, y: MARGIN.top, width: right, height: bottom - MARGIN.top,
    viewBox: `0 ${MARGIN.top} ${right} ${bottom - MARGIN.top}`});
  svg.append(inner);
  drawn = curves.map(({arm, record, points}) => {
    const places = points.map(([step, loss]) =>
      [x(step), Math.min(Math.max(y(loss), MARGIN.top), bottom)]);
    const line = points.map(([step, loss]) => `${x(step).toFixed(1)} ${y(loss).toFixed(1)}`);
    const odd = record.status !== FINISHED;
    const path = make('path',
      {class: `curve ${arm.style} ${odd ? 'odd' : ''}`, d: `M${line.join('L')}`});
    inner.append(path);
    if (!odd && averaged(arm)) path.classList.add('faint');
    if (odd || points.length === 1) {
      const [cx, cy] = places.at(-1);
      svg.append(make('path', {class: `cross ${arm.style}`,
        d: `M${cx - 4} ${cy - 4}l8 8m0 -8l-8 8`}));
    }
    return {arm, record, points, places, path};
  });
  for (const arm of arms.values()) {
    const points = arm.shown ? meanCurve(arm, log) : [];
    if (points.length) {
      const line = points.map(([step, loss]) => `${x(step).toFixed(1)} ${y(loss).toFixed(1)}`);
      inner.append(make('path', {class: `mean ${arm.style}`, d: `M${line.join('L')}`}));
    }
  }
  svg.addEventListener('pointermove', event => point(nearest(svg, event, width)));
  svg.addEventListener('pointerleave', leave);
  svg.addEventListener('blur', leave);
  svg.addEventListener('click', event => visit(nearest(svg, event, width)));
  svg.addEventListener('keydown', event => {
    const next = moved(event.key);
    if (!next) return;
    event.preventDefault();
    if (event.key === 'Enter') visit(next);
    else if (event.key === 'Escape') leave();
    else point(next);
  });
  svg.append(make('circle', {id: 'dot', class: 'dot', r: 3.5, cx: -9, cy: -9}));
  plot.replaceChildren(svg);
}

// Means are over the same seeds for every arm; one that lacks a seed has none.
function averaged(arm) {
  return seeds.length > 1 && seeds.every(seed =>
    arm.trials.some(r => r.seed === seed && r.status === FINISHED && r.curve.length));
}

function meanCurve(arm, log) {
  if (!averaged(arm)) return [];
  const losses = seeds.map(seed => new Map(arm.trials.find(r => r.seed === seed).curve));
  return [...losses[0].keys()].filter(step => (!log || step > 0)
    && losses.every(loss => Number.isFinite(loss.get(step)))).map(step =>
    [step, losses.reduce((sum, loss) => sum + loss.get(step), 0) / losses.length]);
}

// Returns {curve, index} of the drawn point nearest to the pointer, null if it is far from all.
function nearest(svg, event, width) {
  const box = svg.getBoundingClientRect(), unit = width / box.width;
  const px = (event.clientX - box.left) * unit, py = (event.clientY - box.top) * unit;
  let best = null, least = 40 ** 2;
  for (const curve of drawn) {
    curve.places.forEach(([x, y], index) => {
      const far = (x - px) ** 2 + (y - py) ** 2;
      if (far < least) [best, least] = [{curve, index}, far];
    });
  }
  return best;
}

// Returns {curve, index} after a key, undefined for a key that means nothing here.
function moved(key) {
  const side = {ArrowLeft: -1, ArrowRight: 1}[key], level = {ArrowUp: -1, ArrowDown: 1}[key];
  if (!side && !level && !(current && ['Enter', 'Escape'].includes(key))) return undefined;
  if (!current) return {curve: drawn[0], index: drawn[0].points.length - 1};
  const {curve, index} = current;
  if (side) {
    return {curve, index: Math.min(Math.max(index + side, 0), curve.points.length - 1)};
  }
  if (!level) return current;
  const here = curve.places[index];
  const at = drawn.map(other => {
    const gaps = other.places.map(([x]) => Math.abs(x - here[0]));
    const near = gaps.indexOf(Math.min(...gaps));
    return {curve: other, index: near, height: other.places[near][1]};
  }).sort((a, b) => a.height - b.height);
  return at[at.findIndex(one => one.curve === curve) + level] || current;
}

function point(found) {
  leave();
  if (!found) return;
  current = found;
  const {curve: {arm, record, points, places, path}, index} = found;
  const svg = byId('plot').firstElementChild, tooltip = byId('tooltip');
  svg.classList.add('others');
  path.classList.add('near');
  byId('dot').setAttribute('cx', places[index][0]);
  byId('dot').setAttribute('cy', places[index][1]);
  const ending = record.status === FINISHED ? '' : ` (${record.status})`;
  const [step, loss] = points[index];
  tooltip.textContent =
    `${arm.name}\nseed ${record.seed}${ending}\nstep ${show(step)}, loss ${show(loss)}`;
  tooltip.hidden = false;
  const dot = byId('dot').getBoundingClientRect(), box = tooltip.getBoundingClientRect();
  const left = dot.right + 12 + box.width < innerWidth ? dot.right + 12 : dot.left - 12 - box.width;
  const top = dot.top - box.height - 8 > 0 ? dot.top - box.height - 8 : dot.bottom + 8;
  tooltip.style.left = `${Math.max(4, Math.min(left, innerWidth - box.width - 4))}px`;
  tooltip.style.top = `${top}px`;
}

function leave() {
  if (current) {
    current.curve.path.classList.remove('near');
    byId('plot').firstElementChild.classList.remove('others');
    byId('dot').setAttribute('cx', -9);
  }
  current = null;
  byId('tooltip').hidden = true;
}

function visit(found) {
  if (found) location.hash = link(found.curve.arm.name, found.curve.record.trial);
}
