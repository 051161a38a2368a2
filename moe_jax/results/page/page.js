// Draws the page from the JSON in #data. All text from records is set as textContent.
const {study, columns, rows, records, comparisons, notes, warnings, panels, loads, seeds, labels, given} = JSON.parse(document.getElementById('data').textContent);
const FINISHED = 'finished';
const STATUSES = [FINISHED, 'diverged', 'failed', 'unfinished', 'missing', 'damaged'];
const COLORS = 7;
// Columns of names that a planned comparison begins with; a verdict and numbers follow.
const NAMES = 2;
const byId = id => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const svg = ['svg', 'line', 'path', 'text', 'g', 'circle', 'rect', 'title'].includes(tag);
  const element = svg
    ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null) element.setAttribute(name, value);
  }
  element.append(...children.filter(child => child !== null).map(child =>
    child instanceof Node ? child : document.createTextNode(child)));
  return element;
}

function shortNumber(value) {
  const text = Number.isInteger(value) ? value.toLocaleString('en-US')
    : Math.abs(value) >= 1e-3 && Math.abs(value) < 1e6
      ? String(Number(value.toPrecision(5))) : value.toExponential(3);
  return text.replaceAll('-', '\u2212');
}

function show(value) {
  if (value === null || value === undefined || value === '') return '\u2013';
  if (typeof value === 'number') return shortNumber(value);
  if (Array.isArray(value)) return value.map(show).join(', ');
  if (typeof value === 'object') {
    return Object.entries(value).map(([key, one]) => `${key} ${show(one)}`).join(', ');
  }
  return String(value);
}

// An arm by the label that its study gives it, as in every table.
const called = name => given[name] || name;

// A name that is broken between words, or else after what joins the parts of one.
function broken(name) {
  return name.split(/(\s+)/).filter(Boolean).map(word => word.trim() ? make('span', {class: 'word'},
    ...word.split(/(?<=[_=,/])/).flatMap((part, index) => index ? [make('wbr'), part] : [part])) : word);
}

// Arms: the order of the study, each with its trials by seed, a colour and dashes.
const arms = new Map();
for (const name of [...study.arms, ...rows.map(row => row.arm), ...records.map(r => r.arm)]) {
  if (!arms.has(name)) arms.set(name, {name, trials: [], shown: true});
}
records.forEach(record => arms.get(record.arm).trials.push(record));
const inTable = new Set(rows.map(row => row.arm));
for (const [name, arm] of arms) {
  if (!arm.trials.length && !inTable.has(name)) arms.delete(name);
}
[...arms.values()].forEach((arm, index) => {
  arm.index = index;
  arm.style = `c${index % COLORS} d${Math.floor(index / COLORS) % 3}`;
  arm.trials.sort((a, b) => a.seed - b.seed);
});

function statuses(trials) {
  const parts = STATUSES.flatMap(status => {
    const count = trials.filter(trial => trial.status === status).length;
    return count ? [', ', make('span', {class: `status ${status}`}, `${count} ${status}`)] : [];
  });
  return make('span', {class: 'statuses'}, ...parts.slice(1));
}

function drawHead() {
  byId('name').textContent = study.name;
  byId('question').textContent = study.question;
  const better = study.metric.lower_is_better ? 'lower' : 'higher';
  byId('facts').append(
    `${study.metric.name} on the ${study.split} split (${study.metric.unit}; ${better} is better). `
    + `${arms.size} arms, ${records.length} trials: `, statuses(records));
  if (study.dropped.length) {
    byId('dropped').textContent = 'Not run: '
      + study.dropped.map(([name, reason]) => `${name} (${reason})`).join('; ');
  }
}

function drawArms() {
  for (const arm of arms.values()) {
    const box = make('input', {type: 'checkbox'});
    box.checked = true;
    box.addEventListener('change', () => { arm.shown = box.checked; update(); });
    arm.box = box;
    arm.label = make('label', {}, box,
      make('svg', {class: `swatch ${arm.style}`, viewBox: '0 0 29 10', 'aria-hidden': 'true'},
        make('line', {x1: 0, x2: 29, y1: 5, y2: 5, class: arm.style})),
      make('span', {title: called(arm.name) === arm.name ? null : arm.name}, called(arm.name)));
    const only = make('button', {type: 'button', class: 'only', 'aria-label': `only ${arm.name}`}, 'only');
    only.addEventListener('click', () => {
      for (const other of arms.values()) other.shown = other.box.checked = other === arm;
      update();
    });
    arm.label.append(only);
    byId('arms').append(arm.label);
  }
  const found = () => [...arms.values()].filter(arm => !arm.label.hidden);
  const check = value => () => {
    for (const arm of found()) arm.shown = arm.box.checked = value;
    update();
  };
  byId('all').addEventListener('click', check(true));
  byId('none').addEventListener('click', check(false));
  byId('filter').addEventListener('input', event => {
    const words = event.target.value.toLowerCase().split(/\s+/);
    for (const arm of arms.values()) {
      const name = `${arm.name} ${called(arm.name)}`.toLowerCase();
      arm.label.hidden = !words.every(word => name.includes(word));
    }
  });
}

// The table. A cell is a value, or {text, order} of which the latter is sorted by.
const isCell = value => value !== null && typeof value === 'object' && 'order' in value;
const orderOf = value => isCell(value) ? value.order : value;
let tableRows = [];

function compare(a, b, sign) {
  const missing = value => value === null || value === undefined;
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  if (typeof a === 'number' && typeof b === 'number') return sign * (a - b);
  return sign * show(a).localeCompare(show(b), 'en', {numeric: true});
}

function drawTable() {
  const unfinished = row => arms.get(row.arm).trials.filter(r => r.status !== FINISHED).length;
  const all = [...columns, ['trials', 'trials']];
  // A column of numbers is one where they lack, too.
  const numeric = new Set(columns.map(([key]) => key).filter(key => key !== 'arm'
    && rows.some(row => typeof orderOf(row[key]) === 'number')));
  const classOf = key => numeric.has(key) ? 'number' : null;
  const heads = all.map(([key, label], column) => {
    const button = make('button', {type: 'button'}, label);
    const head = make('th', {scope: 'col', class: classOf(key), 'aria-sort': 'none'}, button);
    button.addEventListener('click', () => {
      const up = head.getAttribute('aria-sort') !== 'ascending';
      heads.forEach(other => other.setAttribute('aria-sort', 'none'));
      head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
      const value = column === columns.length ? unfinished : row => orderOf(row[key]);
      tableRows.sort((a, b) => compare(value(a.row), value(b.row), up ? 1 : -1));
      byId('table').tBodies[0].append(...tableRows.map(({element}) => element));
    });
    return head;
  });
  tableRows = rows.map(row => {
    const cells = columns.map(([key, label]) => {
      const value = row[key];
      if (key === 'arm') {
        return make('td', {class: 'arm', title: called(value) === value ? null : value},
          make('a', {href: link(row.arm)}, ...broken(show(called(value)))));
      }
      const exact = typeof orderOf(value) === 'number' ? orderOf(value) : null;
      return make('td', {class: classOf(key), title: exact, 'data-label': label},
        isCell(value) ? value.text : show(value));
    });
    cells.push(make('td', {'data-label': 'trials'}, statuses(arms.get(row.arm).trials)));
    return {row, element: make('tr', {}, ...cells)};
  });
  byId('table').append(make('thead', {}, make('tr', {}, ...heads)),
    make('tbody', {}, ...tableRows.map(({element}) => element)));
}

function drawNotes() {
  const [head, ...planned] = comparisons;
  if (head) {
    const classOf = column => column > NAMES ? 'number' : column ? null : 'arm';
    const heads = head.map((title, column) => make('th', {scope: 'col',
      class: column > NAMES ? 'number' : null}, title));
    byId('planned').append(make('thead', {}, make('tr', {}, ...heads)), make('tbody', {},
      ...planned.map(row => make('tr', {}, ...row.map((cell, column) => make('td',
        {class: classOf(column), 'data-label': column ? head[column] : null},
        ...(column < NAMES ? broken(cell) : [cell])))))));
  }
  byId('planned').closest('section').hidden = !head;
  byId('notes').append(...notes.map(note => make('li', {class: 'quiet'}, note)),
    ...warnings.map(warning => make('li', {}, make('strong', {}, 'warning: '), warning)));
  byId('notes').closest('section').hidden = !notes.length && !warnings.length;
}

// Trials: arms and trials fold; what is inside a trial is made when it is opened first.
const link = (arm, trial = '') => `#${encodeURIComponent(JSON.stringify([arm, trial]))}`;

function flat(config, prefix = '') {
  return Object.entries(config).flatMap(([name, value]) =>
    value !== null && typeof value === 'object' && !Array.isArray(value)
      ? flat(value, `${prefix}${name}.`) : [[prefix + name, JSON.stringify(value)]]);
}

const differing = new Set();
{
  const first = new Map();
  const flats = records.map(record => flat(record.config)).filter(fields => fields.length);
  flats.flat().forEach(([name, value]) => {
    if (!first.has(name)) first.set(name, value);
    if (first.get(name) !== value) differing.add(name);
  });
}

function factTable(pairs) {
  return make('table', {class: 'facts'}, make('tbody', {}, ...pairs.map(([name, value]) =>
    make('tr', {}, make('th', {scope: 'row'}, name),
      make('td', {}, value instanceof Node ? value : show(value))))));
}

function folded(title, ...children) {
  return make('details', {}, make('summary', {}, title), ...children);
}

function configOf(record) {
  const fields = flat(record.config);
  const first = fields.filter(([name]) => differing.has(name));
  const others = fields.filter(([name]) => !differing.has(name));
  const lines = [...first, ...others].map(([name, value], index) => {
    const text = `  ${JSON.stringify(name)}: ${value}${index < fields.length - 1 ? ',' : ''}\n`;
    return index < first.length ? make('mark', {}, text) : text;
  });
  return folded(`config (${first.length} fields that differ between trials first)`,
    make('pre', {class: 'config', tabindex: 0}, '{\n', ...lines, '}'));
}

function commandOf(record) {
  const code = make('pre', {class: 'command', tabindex: 0}, record.command);
  const said = make('span', {class: 'quiet', role: 'status'});
  const button = make('button', {type: 'button'}, 'copy');
  button.addEventListener('click', async () => {
    try {
      await navigator.clipboard.writeText(record.command);
      said.textContent = 'copied';
    } catch {
      // Some browsers have no clipboard for local files; the text is then ready for Ctrl-C.
      getSelection().selectAllChildren(code);
      said.textContent = document.execCommand('copy') ? 'copied' : 'selected: copy it with Ctrl-C';
    }
  });
  return [make('h3', {}, 'Command that makes this trial again'), code, make('p', {class: 'tools'}, button, said)];
}

function fillTrial(record) {
  const dirty = {true: ' with uncommitted changes', false: ''}[record.git_dirty] || '';
  const facts = [
    ['status', make('span', {class: `status ${record.status}`}, record.status)],
    ['reason', record.reason],
    ['trial', record.trial],
    ['steps', `${show(record.step)} of ${show(record.num_steps)}`],
    ['tokens', record.tokens],
    ['parameters', record.parameters],
    ['FLOPs per token', record.flops_per_token],
    ['commit', record.git_commit ? record.git_commit + dirty : null],
    ['devices', record.devices],
    ['trials in its program', record.pack],
    ['mesh', record.mesh],
    ['data', record.data.name],
    ['data fingerprint', record.data.fingerprint],
    ['tokenizer', record.data.tokenizer],
  ].filter(([name, value]) => name !== 'reason' || value);
  const metrics = Object.entries(record.metrics).sort(([a], [b]) =>
    (b === study.metric.name) - (a === study.metric.name) || a.localeCompare(b));
  return [
    factTable(facts),
    metrics.length ? make('h3', {}, 'Metrics') : null,
    metrics.length ? factTable(metrics) : null,
    Object.keys(record.domains).length
      ? folded('by domain', make('pre', {tabindex: 0}, JSON.stringify(record.domains, null, 2)))
      : null,
    ...(record.command ? commandOf(record) : []),
    configOf(record),
  ].filter(part => part !== null);
}

function drawTrials() {
  for (const arm of arms.values()) {
    arm.details = make('details', {}, make('summary', {}, arm.name, statuses(arm.trials)));
    for (const record of arm.trials) {
      const value = record.metrics[study.metric.name];
      const said = value === undefined ? record.reason : `${show(value)} ${study.metric.unit}`;
      const details = make('details', {class: 'trial'}, make('summary', {}, `seed ${record.seed}`,
        make('span', {class: `status ${record.status}`}, record.status),
        make('span', {class: 'quiet'}, said)));
      details.addEventListener('toggle', () => {
        if (details.open && details.childElementCount === 1) details.append(...fillTrial(record));
      });
      record.details = details;
      arm.details.append(details);
    }
    byId('trials').append(arm.details);
  }
  const odd = records.filter(record => record.status !== FINISHED);
  byId('ended').append(...odd.map(record => make('li', {},
    make('span', {class: `status ${record.status}`}, record.status), ' ',
    make('a', {href: link(record.arm, record.trial)}, `${record.arm}, seed ${record.seed}`),
    ` at step ${show(record.step)}${record.reason ? `: ${record.reason}` : ''}`)));
  byId('ended').closest('section').hidden = !odd.length;
}

// Opens what the address names: an arm, or one of its trials.
function follow() {
  let arm, trial;
  try {
    [arm, trial] = JSON.parse(decodeURIComponent(location.hash.slice(1)));
  } catch {
    return;
  }
  const found = arms.get(arm);
  if (!found) return;
  found.details.hidden = false;
  found.details.open = true;
  const record = found.trials.find(r => r.trial === trial);
  const target = record ? record.details : found.details;
  target.open = true;
  target.scrollIntoView();
  target.querySelector('summary').focus();
}

function update() {
  const shown = [...arms.values()].filter(arm => arm.shown).length;
  byId('shown').textContent = `${shown} of ${arms.size} shown`;
  for (const {row, element} of tableRows) element.hidden = !arms.get(row.arm).shown;
  for (const arm of arms.values()) arm.details.hidden = !arm.shown;
  drawFigures();
  drawCurves();
  fitTables();
}

drawHead();
drawArms();
drawTable();
drawNotes();
drawTrials();
update();
byId('log').addEventListener('change', drawCurves);
let width = byId('plot').clientWidth;
new ResizeObserver(() => {
  if (byId('plot').clientWidth === width) return;
  width = byId('plot').clientWidth;
  drawCurves();
  fitTables();
}).observe(byId('plot'));
addEventListener('hashchange', follow);
// The address that is already there changes nothing, but is followed all the same.
document.addEventListener('click', event => {
  const anchor = event.target.closest('a');
  if (anchor && anchor.hash === location.hash) follow();
});
follow();
