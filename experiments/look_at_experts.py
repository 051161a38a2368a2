"""Three figures of what the experts of a trained run do; a notebook in the form of a script.

    python experiments/look_at_experts.py runs/quickstart OUT_DIR

Open it in an editor that knows `# %%` cells (VS Code, Jupytext), or run it as a whole: the figures
are saved as PNG in the folder of the second argument, by default `figures` in that of the run.
"""

# %% What to look at.
import pathlib
import sys

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import moe_jax
from moe_jax import cli
from moe_jax.errors import DAMAGED_EXIT_CODE, DamagedError, UserError
from moe_jax.results import style
from moe_jax.results.panels import wrapped

arguments = [] if 'ipykernel' in sys.modules else sys.argv[1:]
RUN = arguments[0] if arguments else 'runs/quickstart'
OUT = pathlib.Path(arguments[1] if len(arguments) > 1 else f'{RUN}/figures')
SPLIT = 'test'
TOKENS_PER_DOMAIN = 4000  # that are read; more is slower and less noisy
TEXT = 'To be, or not to be, that is the question: whether it is nobler in the mind to suffer.'

matplotlib.rcParams.update({**style.SCREEN, 'axes.grid': False})


def save(figure, name, what):
  """Gives a figure its title, saves it, and returns it for the notebook to show."""
  run_name = f'{run.directory.resolve().name} ({run.config.moe.router}, step {run.step:,})'
  figure.suptitle(wrapped(f'{what}: {run_name}', int(11 * figure.get_figwidth())))
  OUT.mkdir(parents=True, exist_ok=True)
  figure.savefig(OUT / name, dpi=150)
  print(OUT / name)
  return figure


def visible(piece):
  """Returns the text of a token with its blanks and line ends made visible."""
  return repr(piece)[1:-1].replace(' ', '\u00b7').replace('$', r'\$')


# %% Open the run and read held-out documents of each domain.
if len(arguments) > 2:
  cli.fail(f'argument={arguments[2]!r}: not understood; give a run and a folder for the figures')
try:
  run = moe_jax.load_run(RUN)
except UserError as error:
  cli.fail(str(error))
except DamagedError as error:
  cli.fail(str(error), DAMAGED_EXIT_CODE)
NUM_EXPERTS = run.config.moe.num_experts
if not NUM_EXPERTS:
  cli.fail(f'RUN={RUN!r}: a dense model has no experts to look at')


def read(domain):
  """Returns (tokens [N], experts [L N K], pieces) of the first documents of a domain."""
  outputs, num_tokens = [], 0
  for document in run.dataset.document_text(SPLIT, domain):
    # A token has at least one byte, and most have one character or more.
    outputs.append(run.forward(document.decode()[: TOKENS_PER_DOMAIN - num_tokens]))
    num_tokens += len(outputs[-1].tokens)
    if num_tokens >= TOKENS_PER_DOMAIN:
      break
  return (
    np.concatenate([out.tokens for out in outputs]),
    np.concatenate([out.experts for out in outputs], axis=1),
    [piece for out in outputs for piece in out.pieces],
  )


domains = [name for name in run.dataset.domains if run.dataset.num_documents(SPLIT, name)]
readings = {name: read(name) for name in domains}
NUM_LAYERS = len(readings[domains[0]][1])

# %% Figure 1: load of each expert by domain, for every layer.


def load_of(experts):
  """Returns the share of the assignments [N K] that each expert has, [E]."""
  counts = np.bincount(experts[experts >= 0], minlength=NUM_EXPERTS)
  return counts / max(1, counts.sum())


load_LNE = np.array(
  [[load_of(experts[layer]) for _, experts, _ in readings.values()] for layer in range(NUM_LAYERS)]
)
relative = load_LNE * NUM_EXPERTS
norm = style.load_norm([relative])
height = 1.6 + NUM_LAYERS * (0.5 + 0.28 * len(domains))
figure = Figure(figsize=(max(6, 2.5 + 0.3 * NUM_EXPERTS), height), layout='constrained')
panels = figure.subplots(NUM_LAYERS, 1, squeeze=False, sharex=True)[:, 0]
for layer, axes in enumerate(panels):
  image = axes.imshow(relative[layer], aspect='auto', cmap=style.LOAD_COLORS, norm=norm)
  axes.set_yticks(range(len(domains)), [wrapped(name) for name in domains])
  axes.set_title(f'MoE layer {layer}', fontsize='medium')
axes.set_xlabel('expert')
axes.xaxis.get_major_locator().set_params(integer=True)
exceeded = bool(relative.max() > norm.vmax)
style.load_bar(figure, image, panels, exceeded, location='bottom', aspect=40)
save(figure, 'load_by_domain.png', f'Load of each expert by domain, {SPLIT} split')

# %% Figure 2: the tokens that most prefer each expert of a layer.
LAYER, NUM_TOP, LEAST_COUNT = NUM_LAYERS - 1, 8, 10
tokens = np.concatenate([found[0] for found in readings.values()])
chosen = np.concatenate([found[1][LAYER] for found in readings.values()])
pieces = [piece for found in readings.values() for piece in found[2]]
names = dict(zip(tokens.tolist(), pieces, strict=True))
kinds, index, frequency = np.unique(tokens, return_inverse=True, return_counts=True)
# Of each kind of token, the share of its occurrences that select each expert.
to_expert = np.zeros((len(kinds), NUM_EXPERTS))
for selected in chosen.T:
  asked = selected >= 0
  np.add.at(to_expert, (index[asked], selected[asked]), 1)
share = to_expert / frequency[:, None]
# Most frequent first, so that it stands above others of the same share.
candidates = np.argsort(-frequency, kind='stable')
candidates = candidates[frequency[candidates] >= min(LEAST_COUNT, frequency.max())]
columns = min(NUM_EXPERTS, 4 if NUM_EXPERTS <= 16 else 8)
rows = -(-NUM_EXPERTS // columns)
figure = Figure(figsize=(max(6, 2.2 * columns), 0.9 + 1.9 * rows), layout='constrained')
panels = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
for expert, axes in enumerate(panels):
  if expert >= NUM_EXPERTS:
    axes.set_visible(False)
    continue
  best = candidates[np.argsort(-share[candidates, expert], kind='stable')[:NUM_TOP]]
  # A dead expert has none.
  best = best[share[best, expert] > 0]
  axes.barh(range(len(best)), share[best, expert], color=style.COLORS[0])
  labels = [visible(names[kind]) for kind in kinds[best].tolist()]
  axes.set_yticks(range(len(best)), labels, family='monospace', fontsize='small')
  axes.set(xlim=(0, 1), ylim=(NUM_TOP - 0.5, -0.5))
  axes.axvline((to_expert[:, expert].sum() / len(tokens)).item(), **style.BALANCE)
  axes.set_title(f'expert {expert}', fontsize='medium')
figure.supxlabel("share of the token's occurrences that select the expert (dashed: of all tokens)")
figure.supylabel(f'token (seen at least {min(LEAST_COUNT, frequency.max())} times)')
save(figure, 'preferred_tokens.png', f'Tokens that most prefer each expert of MoE layer {LAYER}')

# %% Figure 3: one text, each token in the colour of its first expert.
out = run.forward(TEXT)
PER_LINE = 95
# Lighter than in the palette, to be written on.
COLORS = 0.35 + 0.65 * np.array(matplotlib.colormaps['tab20'].colors)
color_of = lambda expert: COLORS[expert % len(COLORS)]  # noqa: E731
lines, used = [[]], 0
for place, piece in enumerate(out.pieces):
  if used + len(piece) > PER_LINE:
    lines, used = [*lines, []], 0
  lines[-1].append((place, used, piece))
  used += len(piece)
height = 1 + NUM_LAYERS * (0.3 + 0.28 * len(lines))
figure = Figure(figsize=(10, height), layout='constrained')
panels = figure.subplots(NUM_LAYERS, 1, squeeze=False, sharex=True)[:, 0]
for layer, axes in enumerate(panels):
  for number, line in enumerate(lines):
    for place, start, piece in line:
      expert = out.experts[layer, place, 0]
      color = 'white' if expert < 0 else color_of(expert)
      axes.barh(number, len(piece), left=start, height=0.9, color=color, edgecolor='white', lw=0.8)
      for i, letter in enumerate(piece):
        where = {'ha': 'center', 'va': 'center', 'family': 'monospace'}
        axes.text(start + i + 0.5, number, letter, parse_math=False, **where)
  axes.set(xlim=(0, PER_LINE), ylim=(len(lines) - 0.5, -0.5), xticks=[], yticks=[])
  axes.spines[:].set_visible(False)
  axes.set_ylabel(f'MoE\nlayer {layer}', rotation=0, ha='right', va='center')
seen = np.unique(out.experts[..., 0][out.experts[..., 0] >= 0]).tolist()
figure.legend(
  handles=[Patch(color=color_of(expert), label=str(expert)) for expert in seen],
  title='expert',
  loc='outside right center',
  handlelength=1,
)
save(figure, 'experts_of_a_text.png', 'First expert of each token of a text')
