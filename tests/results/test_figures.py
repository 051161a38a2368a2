"""Figures of a study: what each shows, of what, and when there is none."""

import dataclasses

import matplotlib
import numpy as np
import pytest

from moe_jax.results import expert_figures, figures, loss_figure, style
from moe_jax.results.records import FINISHED
from moe_jax.study import Metric, labels_of
from tests.results import example

STUDY, RECORDS = example.study(), example.records()
MOE = [arm.name for arm in STUDY.arms if not arm.dropped and arm.name != 'dense']
LABELS = [labels_of(STUDY)[arm] for arm in MOE]
# With a trial that failed and one that diverged.
FEW = [record for record in RECORDS if record.arm in ('dense', *MOE[3:5])]
OF_EXPERTS = (expert_figures.load, expert_figures.domain_load, expert_figures.specialization)
DRAWINGS = (loss_figure.loss_curves, figures.metric, figures.drop_share, figures.iso_flops)


def _bare(**changes):
  """Records without anything that figures show."""
  none = {'metrics': {}, 'domains': {}, 'curve': [], 'load': []} | changes
  return [dataclasses.replace(record, **none) for record in RECORDS]


def _legend(axes):
  return [text.get_text().replace('\n', ' ') for text in axes.get_legend().get_texts()]


def _line(axes, label):
  """The line that a label belongs to."""
  handles, labels = axes.get_legend_handles_labels()
  handle = handles[[text.replace('\n', ' ') for text in labels].index(label)]
  return handle[0] if isinstance(handle, tuple) else handle


def _note(figure):
  return '' if figure._supxlabel is None else figure._supxlabel.get_text()


def _crossed():
  """The study with a third factor."""
  records = []
  for number in range(5):
    for record in RECORDS:
      extra = {'optim.b1': number / 10}
      records.append(
        dataclasses.replace(
          record,
          arm=f'{record.arm}, b1={number / 10}',
          changes=record.changes | extra,
          config={},
          trial=f'{record.trial}{number}',
        )
      )
  return dataclasses.replace(STUDY, arms=()), records


def test_files_are_the_same_each_time(tmp_path):
  one = figures.save_all(STUDY, FEW, tmp_path / 'one')
  other = figures.save_all(STUDY, list(reversed(FEW)), tmp_path / 'deep' / 'other')
  assert [path.name for path in one] == [path.name for path in other]
  for path, again in zip(one, other, strict=True):
    assert path.read_bytes() == again.read_bytes(), path.name
    assert b'CreationDate' not in path.read_bytes()
  stems = [path.stem for path in one if path.suffix == '.png']
  assert [path.stem for path in one if path.suffix == '.pdf'] == stems
  assert stems == [
    'loss',
    'metric',
    'drop_share',
    'iso_flops',
    'load',
    'domain_load',
  ]


def test_only_what_is_asked_for_is_written(tmp_path):
  paths = figures.save_all(STUDY, FEW, tmp_path, only={'metric.png', 'other.png'})
  assert [path.name for path in paths] == ['metric.png']
  assert [path.name for path in tmp_path.iterdir()] == ['metric.png']


def test_names_of_arms_are_no_formulas(tmp_path):
  names = {MOE[0]: '../a/$b$ <i>', MOE[1]: '../a/$B$ <i>', MOE[2]: r'$\frac{'}
  records = [dataclasses.replace(r, arm=names[r.arm]) for r in RECORDS if r.arm in names]
  assert figures.save_all(dataclasses.replace(STUDY, arms=(), baseline=''), records, tmp_path)


def _of_experts():
  """Records with every measure of specialisation."""
  measured = {f'dropless/{path}': [0.1, 0.3] for path in expert_figures.SPECIALIZATION}
  return [dataclasses.replace(r, metrics=r.metrics | measured) for r in RECORDS if r.arm in MOE]


def _renamed(records):
  """Records of arms with one long word each, and with many."""
  names = {MOE[2]: f'moe.{"load_balancing_" * 3}weight=0.0001', MOE[4]: 'an arm of words ' * 6}
  return [dataclasses.replace(r, arm=names.get(r.arm, r.arm)) for r in records]


@pytest.mark.parametrize(
  ('draw', 'width'),
  [
    *((draw, style.COLUMN_WIDTH) for draw in DRAWINGS[1:]),
    # Of 7 arms each in a panel.
    (loss_figure.loss_curves, style.PAGE_WIDTH),
    (expert_figures.load, style.COLUMN_WIDTH),
    *((draw, style.PAGE_WIDTH) for draw in OF_EXPERTS[1:]),
  ],
  ids=lambda value: getattr(value, '__name__', None),
)
def test_figures_are_as_wide_as_they_are_printed_and_can_be_read(draw, width):
  records = _of_experts() if draw is expert_figures.specialization else RECORDS
  for of in (records, _renamed(records)):
    figure = draw(dataclasses.replace(STUDY, arms=()) if of is not records else STUDY, of)
    _check_print(figure)
    assert figure.get_figwidth() == width


def test_figures_of_few_arms_fit_in_a_column():
  of_experts = [record for record in RECORDS if record.arm in MOE[3:5]]
  for draw, records in ((loss_figure.loss_curves, FEW), (expert_figures.domain_load, of_experts)):
    figure = draw(STUDY, records)
    _check_print(figure)
    assert figure.get_figwidth() == style.COLUMN_WIDTH


def _check_print(figure):
  """Checks that no text is smaller than 7 points, and that nothing is cut off."""
  with matplotlib.rc_context(style.STYLE):
    figure.draw_without_rendering()
    box = figure.get_tightbbox()
  texts = [t for t in figure.findobj(matplotlib.text.Text) if t.get_text() and t.get_visible()]
  assert min(text.get_fontsize() for text in texts) >= 7
  width, height = figure.get_size_inches()
  assert box.x0 >= -0.02 and box.y0 >= -0.02, box
  assert box.x1 <= width + 0.02 and box.y1 <= height + 0.02, (box, width, height)


def test_nothing_is_drawn_of_what_records_lack(tmp_path):
  for records in ([], _bare()):
    assert [draw(STUDY, records) for draw in DRAWINGS + OF_EXPERTS] == [None] * 7
    assert figures.save_all(STUDY, records, tmp_path / 'none') == {}
  assert not (tmp_path / 'none').exists()
  dense = [record for record in RECORDS if record.arm == 'dense']
  assert [draw(STUDY, dense) for draw in OF_EXPERTS] == [None] * 3


@pytest.mark.parametrize('seeds', [(0,), (2,)])
def test_one_seed_is_enough(seeds, tmp_path):
  records = [record for record in FEW if record.seed in seeds]
  assert figures.save_all(STUDY, records, tmp_path)


def test_trials_that_never_finish_are_drawn_all_the_same(tmp_path):
  records = _bare(
    status='diverged', curve=[[10, 5.0], [20, 4.0], [30, float('nan')]], load=RECORDS[3].load
  )
  paths = figures.save_all(STUDY, records[:6], tmp_path)
  assert 'loss.png' in [path.name for path in paths]
  assert 'metric.png' not in [path.name for path in paths]


def test_metric_has_a_line_for_each_value_and_a_level_for_the_dense_arm():
  figure = figures.metric(STUDY, RECORDS)
  (axes,) = figure.axes
  assert _legend(axes) == ['num_selected_experts=1', 'num_selected_experts=2', 'dense']
  assert axes.get_xscale() == 'log'
  assert [text.get_text() for text in axes.get_xticklabels()] == ['4', '16', '64']
  assert axes.get_ylabel() == 'bits per byte (dropless, test split)'
  line = _line(axes, 'num_selected_experts=2')
  assert line.get_xdata().tolist() == [4, 16, 64]
  values = {(r.arm, r.seed): r.metrics[STUDY.metric.name] for r in RECORDS if r.status == FINISHED}
  means = [
    np.mean([value for (arm, _), value in values.items() if arm == example.TOP_2.format(experts)])
    for experts in (4, 16, 64)
  ]
  np.testing.assert_allclose(line.get_ydata().astype(float), means)
  level = _line(axes, 'dense').get_ydata()
  np.testing.assert_allclose(level, np.mean([values['dense', seed] for seed in STUDY.seeds]))
  # Every finished seed of the arms with experts is a point.
  points = [y for line in axes.lines if line.get_linestyle() == 'None' for y in line.get_ydata()]
  seeds = [value for (arm, _), value in values.items() if arm != 'dense']
  assert set(seeds) <= set(points)
  low, high = axes.get_ylim()
  assert low < min(points) and high > max(level)
  assert _note(figure) == 'not in the means: 1 diverged, 1 failed, 1 unfinished'


def test_lines_keep_their_order_where_an_arm_is_lost():
  records = [record for record in RECORDS if record.arm != example.TOP_1.format(4)]
  (axes,) = figures.metric(STUDY, records).axes
  assert _legend(axes)[:2] == ['num_selected_experts=1', 'num_selected_experts=2']


def test_a_further_factor_splits_lines_but_not_one_that_goes_along_x():
  study, records = _crossed()
  figure = figures.metric(study, records)
  names = sum([_legend(axes) for axes in figure.axes], [])
  assert 'num_selected_experts=2, b1=0.3' in names
  assert len([name for name in names if 'dense' not in name]) == 10
  along = [
    dataclasses.replace(r, changes=r.changes | {'moe.mlp_dim': 8 * r.changes['moe.num_experts']})
    for r in RECORDS
  ]
  (axes,) = figures.metric(STUDY, along).axes
  assert len(_legend(axes)) == 3


def test_x_may_hold_zero_names_or_nothing():
  study, records = _crossed()
  zero = dataclasses.replace(study, x='optim.b1', lines='moe.num_experts')
  axes = figures.metric(zero, records).axes[0]
  assert axes.get_xscale() == 'symlog'
  named = [
    dataclasses.replace(r, changes={'moe.router': f'router {r.changes["moe.num_experts"]}'})
    for r in RECORDS
    if r.changes.get('moe.num_selected_experts') == 1
  ]
  names = dataclasses.replace(STUDY, x='moe.router', lines='')
  named = [dataclasses.replace(r, config={}) for r in named]
  (axes,) = figures.metric(names, named).axes
  assert [text.get_text() for text in axes.get_xticklabels()] == [
    'router 4',
    'router 16',
    'router 64',
  ]
  (axes,) = figures.metric(dataclasses.replace(STUDY, x='', lines=''), RECORDS).axes
  labels = [text.get_text().replace('\n', ' ') for text in axes.get_yticklabels()]
  assert labels == ['dense', *LABELS]
  assert axes.get_xlabel() == 'bits per byte (dropless, test split)'


def test_drop_share_leaves_out_evaluations_without_drops():
  (axes,) = figures.drop_share(STUDY, RECORDS).axes
  label = axes.get_xlabel().replace('\n', ' ')
  assert label == 'share of assignments dropped (capacity; test split)'
  assert len(axes.get_yticks()) == len(MOE)
  assert axes.get_xlim()[0] == 0
  none = [
    dataclasses.replace(r, metrics={'dropless/router/drop_share': 0.0})
    for r in RECORDS
    if r.arm in MOE
  ]
  (axes,) = figures.drop_share(STUDY, none).axes
  assert 'dropless' in axes.get_xlabel()


def test_lines_of_equal_flops_go_through_the_best_of_each_size():
  (axes,) = figures.iso_flops(STUDY, RECORDS).axes
  assert _legend(axes) == ['2.458e+13 FLOPs', '2.949e+13 FLOPs']
  assert axes.get_xscale() == 'log'
  assert [text.get_text() for text in axes.get_xticklabels()] == ['600k', '1.2M', '3.6M', '13.2M']
  assert _line(axes, '2.458e+13 FLOPs').get_xdata().tolist() == [1_200_000, 3_600_000, 13_200_000]
  # Dense, as large a compute budget, stands with top-2.
  assert len(_line(axes, '2.949e+13 FLOPs').get_xdata()) == 4
  _, crossed = _crossed()
  worse = [
    dataclasses.replace(r, metrics=dict.fromkeys(r.metrics, 9.0))
    if r.changes['optim.b1'] == 0.4
    else r
    for r in crossed
  ]
  for lower, expected in ((True, False), (False, True)):
    study = dataclasses.replace(STUDY, arms=(), metric=Metric(lower_is_better=lower))
    (axes,) = figures.iso_flops(study, worse).axes
    assert (max(_line(axes, '2.458e+13 FLOPs').get_ydata()) == 9) == expected


def test_flops_that_differ_by_more_than_a_percent_make_no_line():
  apart = [
    dataclasses.replace(r, flops_per_token=int(1e6 * 1.02 ** [*MOE, 'dense'].index(r.arm)))
    for r in RECORDS
  ]
  assert figures.iso_flops(STUDY, apart) is None
  same_size = [dataclasses.replace(r, parameters={'total': 1, 'active': 1}) for r in RECORDS]
  assert figures.iso_flops(STUDY, same_size) is None


def test_equal_flops_are_drawn_of_studies_that_scale():
  assert figures.iso_flops(dataclasses.replace(STUDY, x='', lines=''), RECORDS) is None
  scaled = dataclasses.replace(STUDY, x='', lines='', scaling=True)
  assert figures.iso_flops(scaled, RECORDS) is not None


def test_sizes_within_a_percent_are_one_and_labels_have_room():
  def sized(totals):
    sizes = dict(zip([*MOE, 'dense'], totals, strict=True))
    records = [dataclasses.replace(r, flops_per_token=1, tokens=10**6) for r in RECORDS]
    return [dataclasses.replace(r, parameters={'total': sizes[r.arm]}) for r in records]

  close = [1000 + arm for arm in range(len(MOE) + 1)]
  assert figures.iso_flops(STUDY, sized(close)) is None
  # No line within a size: 1000 to 1006 are one, drawn at its smallest.
  (axes,) = figures.iso_flops(STUDY, sized([*close[:-1], 10**6])).axes
  assert _line(axes, '1e+06 FLOPs').get_xdata().tolist() == [1000, 10**6]
  (axes,) = figures.iso_flops(STUDY, sized([1000, 1020, 1040, 1060, 1080, 1100, 10**6])).axes
  assert [text.get_text() for text in axes.get_xticklabels()] == ['1k', '1M']
