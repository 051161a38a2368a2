"""The page of a study in a real browser, without a network."""

import dataclasses
import json
import re
import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from moe_jax.results import page_figures, summary, tables
from moe_jax.results.page import write_page
from moe_jax.results.records import FINISHED
from tests.results import example

pytestmark = pytest.mark.slow

_FLAGS = (
  '--headless=new',
  '--no-sandbox',
  '--disable-gpu',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
  '--disable-dev-shm-usage',
  '--window-size=1200,1000',
)


def _program(name: str) -> str:
  path = shutil.which(name)
  if path is None:
    pytest.fail(f'{name} is not installed: apt-get install chromium chromium-driver', pytrace=False)
  return path


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
  options = webdriver.ChromeOptions()
  options.binary_location = _program('chromium')
  for flag in _FLAGS:
    options.add_argument(flag)
  options.add_argument(f'--user-data-dir={tmp_path_factory.mktemp("chromium")}')
  options.set_capability('goog:loggingPrefs', {'performance': 'ALL', 'browser': 'ALL'})
  service = webdriver.ChromeService(executable_path=_program('chromedriver'))
  driver = webdriver.Chrome(options=options, service=service)
  yield driver
  driver.quit()


@pytest.fixture(scope='module')
def address(tmp_path_factory):
  path = tmp_path_factory.mktemp('page') / 'index.html'
  of = summary.summarize(
    dataclasses.replace(example.study(), may_differ=('compute',)), example.records()
  )
  figures = page_figures.content(of, example.records())
  planned = tables.comparisons(of)
  write_page(example.study(), example.records(), *example.table(), path, planned, figures=figures)
  return path.as_uri()


@pytest.fixture
def page(browser, address):
  """The page, opened again; after the test the browser has nothing to complain about."""
  browser.get('about:blank')
  browser.get_log('performance')
  browser.get_log('browser')
  browser.get(address)
  yield browser
  assert browser.get_log('browser') == []
  messages = [json.loads(entry['message'])['message'] for entry in browser.get_log('performance')]
  urls = [
    message['params']['request']['url']
    for message in messages
    if message['method'] == 'Network.requestWillBeSent'
  ]
  # The page itself and its empty icon.
  assert address in urls
  assert {url for url in urls if not url.startswith(('file:', 'data:'))} == set()
  assert len([url for url in urls if url.startswith('file:')]) == urls.count(address)


def _all(page, selector):
  return page.find_elements(By.CSS_SELECTOR, selector)


def _one(page, selector):
  return page.find_element(By.CSS_SELECTOR, selector)


def _column(page, number):
  rows = [row for row in _all(page, '#table tbody tr') if row.is_displayed()]
  return [row.find_elements(By.TAG_NAME, 'td')[number].text for row in rows]


def _opened(details):
  details.find_element(By.TAG_NAME, 'summary').click()
  return details


def test_nothing_of_the_records_runs(page):
  # An alert would make every further command fail; the payload is shown as it is.
  assert page.execute_script('return document.scripts.length') == 2
  assert _all(page, 'main img') == []
  assert example.HOSTILE in _one(page, '#table').text
  assert example.HOSTILE in _one(page, '#ended').text


def test_the_security_policy_refuses_scripts_and_network(page):
  blocked = page.execute_async_script("""
    const done = arguments[arguments.length - 1];
    const seen = [];
    document.addEventListener('securitypolicyviolation', event => {
      seen.push(event.effectiveDirective);
      if (seen.length === 2) done(seen.sort());
    });
    const script = document.createElement('script');
    script.textContent = 'window.ran = true';
    document.body.append(script);
    fetch('https://example.invalid/').catch(() => {});
  """)
  assert blocked == ['connect-src', 'script-src-elem']
  assert page.execute_script('return window.ran') is None
  # These complaints were asked for.
  assert all('Content Security Policy' in entry['message'] for entry in page.get_log('browser'))


@pytest.mark.parametrize('key', ['click', Keys.ENTER, Keys.SPACE], ids=['click', 'enter', 'space'])
def test_a_header_sorts_by_click_and_by_key(page, key):
  heads = _all(page, '#table th')
  button = heads[2].find_element(By.TAG_NAME, 'button')
  before = [int(text.replace(',', '')) for text in _column(page, 2)]

  def press():
    button.click() if key == 'click' else button.send_keys(key)
    return [int(text.replace(',', '')) for text in _column(page, 2)]

  assert heads[2].get_attribute('aria-sort') == 'none'
  assert press() == sorted(before)
  assert heads[2].get_attribute('aria-sort') == 'ascending'
  assert press() == sorted(before, reverse=True)
  assert heads[2].get_attribute('aria-sort') == 'descending'
  assert [head.get_attribute('aria-sort') for head in heads].count('none') == len(heads) - 1


def test_names_sort_by_their_numbers_and_gaps_come_last(page):
  heads = _all(page, '#table th button')
  heads[0].click()
  names = [arm.name for arm in example.study().arms if not arm.dropped]
  assert _column(page, 0) == names
  for _ in range(2):
    heads[3].click()
    assert _column(page, 3)[0] == example.HOSTILE


def test_checkboxes_choose_arms_everywhere(page):
  curves = len([record for record in example.records() if record.curve])
  assert len(_all(page, '.curve')) == curves
  boxes = _all(page, '#arms input')
  boxes[0].click()
  assert len(_all(page, '.curve')) == curves - 3
  assert 'dense' not in _column(page, 0)
  assert _one(page, '#shown').text == '6 of 7 shown'
  _one(page, '#none').click()
  assert _all(page, '.curve') == [] and _column(page, 0) == []
  # Buttons mean the arms found.
  _one(page, '#filter').send_keys('experts=16')
  _one(page, '#all').click()
  assert _column(page, 0) == [example.TOP_1.format(16), example.TOP_2.format(16)]
  visible = [details for details in _all(page, '#trials > details') if details.is_displayed()]
  assert len(visible) == 2


def _hover(page, x, y):
  """Moves the pointer to a place of the page in CSS pixels."""
  page.execute_cdp_cmd('Input.dispatchMouseEvent', {'type': 'mouseMoved', 'x': x, 'y': y})


def _at(page, curve, share):
  """Returns where a curve is on the screen, a share of its length along."""
  place = page.execute_script(
    """
    const [path, share] = arguments;
    const at = path.getPointAtLength(share * path.getTotalLength());
    const point = new DOMPoint(at.x, at.y).matrixTransform(path.getScreenCTM());
    return [point.x, point.y];
    """,
    curve,
    share,
  )
  return place


def test_hovering_names_arm_seed_step_and_loss(page):
  _one(page, '#none').click()
  _all(page, '#arms input')[0].click()
  page.execute_script("document.getElementById('plot').scrollIntoView()")
  tooltip = _one(page, '#tooltip')
  assert not tooltip.is_displayed()
  for seed in (1, 2):
    step, loss = _trial('dense', seed).curve[-1]
    _hover(page, *_at(page, _all(page, '.curve')[seed], 1.0))
    assert tooltip.text == f'dense\nseed {seed}\nstep {step:,}, loss {loss:.5g}'
    assert len(_all(page, '.curve.near')) == 1
  _hover(page, 1, 1)
  assert not tooltip.is_displayed()


def test_a_diverged_curve_says_so_and_leads_to_its_trial(page):
  page.execute_script("document.getElementById('plot').scrollIntoView()")
  places = _all(page, '.cross')
  assert len(places) == 2
  box = places[1].rect
  top = page.execute_script('return scrollY')
  place = box['x'] + box['width'] / 2, box['y'] + box['height'] / 2 - top
  _hover(page, *place)
  assert 'seed 2 (diverged)\nstep 400, loss ' in _one(page, '#tooltip').text
  ActionChains(page).move_to_element(places[1]).click().perform()
  opened = _wait(page, lambda: [d for d in _all(page, '.trial') if d.get_attribute('open')])
  assert 'loss is nan at step 420' in opened[0].text


def test_arrow_keys_read_the_curves(page):
  plot = _one(page, '#plot svg')
  page.execute_script('arguments[0].focus()', plot)
  seen = []
  for key in (Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.ARROW_DOWN, Keys.ARROW_UP):
    ActionChains(page).send_keys(key).perform()
    seen.append(_one(page, '#tooltip').text)
  steps = [re.search(r'step ([\d,]+), loss', text)[1] for text in seen]
  assert steps == ['1,000', '975', '975', '975']
  assert len(set(seen)) == 3 and seen[1] == seen[3]
  ActionChains(page).send_keys(Keys.ESCAPE).perform()
  assert not _one(page, '#tooltip').is_displayed()


def test_logarithmic_axes_and_a_narrow_window(page):
  _one(page, '#log').click()
  assert len(_all(page, '.curve')) == len([r for r in example.records() if r.curve])
  page.execute_cdp_cmd(
    'Emulation.setDeviceMetricsOverride',
    {'width': 360, 'height': 800, 'deviceScaleFactor': 1, 'mobile': True},
  )
  try:
    _wait(page, lambda: _width(page) < 400)
    # Only the table scrolls sideways.
    assert page.execute_script('return document.documentElement.scrollWidth') <= 360
  finally:
    page.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})


@pytest.mark.parametrize('width', [400, 1000, 1400])
def test_no_table_is_cut(page, width):
  page.execute_cdp_cmd(
    'Emulation.setDeviceMetricsOverride',
    {'width': width, 'height': 900, 'deviceScaleFactor': 1, 'mobile': False},
  )
  try:
    _wait(page, lambda: page.execute_script('return innerWidth') == width)
    _wait(page, lambda: abs(_width(page) - page.execute_script('return plot.clientWidth')) < 2)
    cut = page.execute_script("""
      return [...document.querySelectorAll('.wide')].filter(
        place => place.scrollWidth > place.clientWidth).length""")
    assert cut == 0
    # A card names what it shows, and keeps it.
    cards = page.execute_script("return document.querySelector('.wide').className")
    assert ('cards' in cards) == (width == 400)
    label = page.execute_script("""
      return getComputedStyle(document.querySelector('#table tbody td:nth-child(2)'),
        '::before').content""")
    assert label == ('"mean (bits per byte)"' if width == 400 else 'none')
    text = _one(page, '#table tbody').text
    assert all(arm.name in text for arm in example.study().arms if not arm.dropped)
  finally:
    page.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})


def test_columns_stand_below_their_heads(page):
  # A gap in a column of numbers stands where numbers do, and heads are as wide as their table.
  wrong = page.execute_script("""
    const wrong = [];
    for (const table of document.querySelectorAll('#table, #planned')) {
      const place = table.closest('.wide').clientWidth, head = table.tHead.offsetWidth;
      if (Math.abs(place - head) > 1) wrong.push([table.id, place, head]);
      const heads = [...table.tHead.rows[0].cells];
      for (const row of table.tBodies[0].rows) {
        [...row.cells].forEach((cell, column) => {
          const [own, above] = [cell, heads[column]].map(c => getComputedStyle(c).textAlign);
          if (own !== above) wrong.push([table.id, column, cell.textContent, own, above]);
        });
      }
    }
    return wrong;""")
  assert wrong == []
  aligned = page.execute_script("""
    return [...document.querySelectorAll('#table tbody td')].filter(cell =>
      cell.className === 'number').map(cell => getComputedStyle(cell).textAlign)""")
  assert set(aligned) == {'right'}
  assert _one(page, '#planned thead').is_displayed()
  # Names are broken between words, and no button is.
  broken = page.execute_script("""
    return [...document.querySelectorAll('.only, #planned .word')].filter(
      word => word.getClientRects().length > 1 || word.offsetHeight > 30).length""")
  assert broken == 0


def test_the_scale_of_loads_has_room_for_intervals(page):
  # Mean 3 and half 0.8 end at 3.8, and 0.5 and 9 at 4, which is all of 4 experts' load.
  ends = page.execute_script("""
    return [[3, 0.8], [0.5, 9]].map(([mean, half]) => {
      const rows = [{arm: 'dense', mean: [mean, 0.5, 0.5, 0], half: [half, 0, 0, 0]}];
      const drawn = loadPanel({layer: 0, rows}, rows);
      const top = name => Math.min(...[...drawn.querySelector(name).getAttribute('d')
        .matchAll(/ ([\\d.]+)/g)].map(found => Number(found[1])));
      const zero = 210, high = mean === 3 ? 3.8 : 4;
      return [top('.band'), top('path.mean'), 6 + (1 - mean / high) * (zero - 6)];
    })""")
  for band, mean, expected in ends:
    assert band == pytest.approx(6, abs=0.1) and mean == pytest.approx(expected, abs=0.1)


def test_figures_show_means_intervals_and_seeds_of_the_arms_chosen(page):
  panels = _all(page, '#panels figure')
  titles = [panel.find_element(By.TAG_NAME, 'strong').text for panel in panels]
  assert titles == [
    'bits per byte',
    'drop share',
    'load of experts, MoE layer 0',
    'load of experts, MoE layer 1',
  ]
  finished = [r for r in example.records() if r.status == FINISHED]
  assert len(panels[0].find_elements(By.CSS_SELECTOR, '.seed')) == len(finished)
  assert len(panels[0].find_elements(By.CSS_SELECTOR, '.interval')) == 7
  assert len(panels[2].find_elements(By.CSS_SELECTOR, '.mean')) == 6
  # Thick means of the seeds that all arms but those that lost one have.
  assert len(_all(page, '#plot path.mean')) == 4
  arm = example.TOP_2.format(64)
  only = _one(page, f'[aria-label="only {arm}"]')
  page.execute_script('arguments[0].scrollIntoView()', only)
  only.click()
  assert _one(page, '#shown').text == '1 of 7 shown'
  assert len(_all(page, '#panels figure')) == 4
  assert len(_all(page, '#panels .interval')) == 2 and len(_all(page, '.curve')) == 3
  assert _all(page, '#panels text')[-3].text


def _width(page):
  return page.execute_script("return document.querySelector('#plot svg').viewBox.baseVal.width")


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_has_contrast_in_both_schemes(page, scheme):
  page.execute_cdp_cmd(
    'Emulation.setEmulatedMedia',
    {'features': [{'name': 'prefers-color-scheme', 'value': scheme}]},
  )
  paper = page.execute_script('return getComputedStyle(document.body).backgroundColor')
  for selector, least in (
    ('h1', 7),
    ('.quiet', 4.5),
    ('.status.finished', 4.5),
    ('.status.failed', 4.5),
    ('.status.unfinished', 4.5),
    ('td a', 4.5),
  ):
    ink = _one(page, selector).value_of_css_property('color')
    assert _contrast(ink, paper) >= least, (selector, ink, paper)
  for curve in _all(page, '.curve'):
    assert _contrast(curve.value_of_css_property('stroke'), paper) >= 3


def _contrast(one, other):
  """Returns the ratio of WCAG 2 between two colours as browsers print them."""

  def luminance(color):
    levels = [int(part) / 255 for part in color[color.index('(') + 1 : -1].split(',')[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in levels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

  low, high = sorted([luminance(one), luminance(other)])
  return (high + 0.05) / (low + 0.05)


def test_a_row_leads_to_its_trials(page):
  arm = example.TOP_2.format(16)
  _one(page, '#table').find_element(By.LINK_TEXT, arm).click()
  details = _wait(page, lambda: _all(page, '#trials > details[open]'))[0]
  assert page.switch_to.active_element == details.find_element(By.TAG_NAME, 'summary')
  trials = details.find_elements(By.CSS_SELECTOR, '.trial')
  trials = [_opened(trial) for trial in trials]
  _wait(page, lambda: all('config (' in trial.text for trial in trials))
  for seed, trial in enumerate(trials):
    record = _trial(arm, seed)
    for fact in (record.trial, record.status, record.reason, record.command, f'seed {seed}'):
      assert fact in trial.text
    if record.status == FINISHED:
      for fact in (record.git_commit, record.data['fingerprint'], 'count 8', *record.metrics):
        assert fact in trial.text
  assert _all(page, '.trial script, .trial img') == []


def test_an_unfinished_trial_is_listed_and_followed(page):
  items = _all(page, '#ended li')
  odd = [record for record in example.records() if record.status != FINISHED]
  assert len(items) == len(odd) == 3
  for item, record in zip(items, odd, strict=True):
    assert item.text.startswith(f'{record.status} {record.arm}, seed {record.seed}')
    assert record.reason in item.text
  # Also when the address names it already, and after it was closed.
  for _ in range(2):
    items[0].find_element(By.TAG_NAME, 'a').click()
    trial = _wait(page, lambda: _all(page, '.trial[open]'))[0]
    trial.find_element(By.TAG_NAME, 'summary').click()


def test_the_config_starts_with_what_differs(page):
  trial = _first_trial(page)
  config = trial.find_elements(By.CSS_SELECTOR, 'details')[-1]
  shown = _opened(config).find_element(By.TAG_NAME, 'pre')
  fields = json.loads(shown.text)
  differing = ['moe.num_experts', 'moe.num_selected_experts', 'train.seed']
  assert list(fields)[:3] == differing
  assert len(shown.find_elements(By.TAG_NAME, 'mark')) == 3
  config = _trial('dense', 0).config
  assert fields == {
    f'{room}.{name}': config[room][name] for room in config for name in config[room]
  }


@pytest.mark.parametrize('clipboard', [True, False])
def test_the_command_is_copied(page, clipboard):
  page.execute_cdp_cmd(
    'Browser.setPermission',
    {
      'permission': {'name': 'clipboard-write', 'allowWithoutSanitization': False},
      'setting': 'granted' if clipboard else 'denied',
    },
  )
  trial = _first_trial(page)
  trial.find_element(By.TAG_NAME, 'button').click()
  said = trial.find_element(By.CSS_SELECTOR, '[role=status]')
  _wait(page, lambda: said.text == 'copied')
  search = _one(page, '#filter')
  search.send_keys(Keys.CONTROL + 'v')
  assert search.get_attribute('value') == _trial('dense', 0).command


def _first_trial(page):
  arm = _opened(_one(page, '#trials > details'))
  trial = _opened(arm.find_element(By.CSS_SELECTOR, '.trial'))
  _wait(page, lambda: 'config (' in trial.text)
  return trial


def _trial(arm, seed):
  return next(r for r in example.records() if (r.arm, r.seed) == (arm, seed))


def _wait(page, condition):
  return WebDriverWait(page, 10).until(lambda _: condition())
