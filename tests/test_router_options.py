"""Options that a router file declares are fields of the config, with nothing written elsewhere."""

import pytest

from moe_jax import router_options, routing
from moe_jax.benchmark.suites import router_rows
from moe_jax.schema import SCHEMA

# Its imports are of nothing: a declaration is read without running the file.
FILE = '''
import not_a_module

from moe_jax import fields

RULES = ('near', 'far')
OTHER = not_a_module.of_no_use


@dataclasses.dataclass(frozen=True)
class Options(MatrixOptions):
  """Two hyperparameters."""

  nearness: float = hyperparameter(fields.share(0.25, 'How near.'))
  rule: str = hyperparameter(fields.one_of('near', RULES, 'Which.'))


raise ValueError
'''


def test_a_new_file_makes_fields(tmp_path):
  (tmp_path / 'nearest.py').write_text(FILE)
  (tmp_path / 'plain.py').write_text('import not_a_module\n')
  (tmp_path / 'other.py').write_text('class Options(ScoreOptions):\n  pass\n')
  found = router_options.declared(tmp_path)
  assert set(found) == {'router_dtype', 'nearness', 'rule', 'score'}
  assert (found['nearness'].default, found['nearness'].meaning) == (0.25, 'nearest: how near.')
  assert found['rule'].choices == ('near', 'far')
  assert found['nearness'].check(0.5) and not found['nearness'].check(1.0)
  assert found['score'].meaning == 'other: what gates are read from.'


def test_one_name_in_two_files_is_refused(tmp_path):
  (tmp_path / 'one.py').write_text(FILE)
  (tmp_path / 'two.py').write_text(FILE)
  with pytest.raises(ValueError, match=r'nearness is declared in .*/one\.py and in two\.py'):
    router_options.declared(tmp_path)


def test_a_field_of_most_routers_names_the_others(tmp_path):
  for name in ('a', 'b', 'c'):
    body = 'class Options(MatrixOptions):\n  pass\n' if name != 'b' else ''
    (tmp_path / f'{name}.py').write_text(body)
  assert router_options.declared(tmp_path)['router_dtype'].meaning.endswith('. Not of b.')


@pytest.mark.parametrize('name', routing.ROUTERS)
def test_what_is_read_of_a_file_is_what_it_declares(name):
  """Read without running the file, and as Python imports it."""
  router = routing.ROUTERS[name]
  own = router_options.own_fields(router.options)
  for field, declared in own.items():
    of_config = SCHEMA['moe'][field]
    assert of_config.default == declared.default == getattr(router.options(4, 2), field)
    assert type(of_config.default) is type(declared.default)
    assert (of_config.allowed, of_config.choices) == (declared.allowed, declared.choices)
  undeclared = SCHEMA['moe'].keys() & router_options.declared().keys() - own.keys()
  assert not any(hasattr(router.options(4, 2), field) for field in undeclared)


@pytest.mark.parametrize('name', routing.ROUTERS)
def test_a_router_has_an_example_that_it_allows(name):
  """`python -m moe_jax.benchmark router` measures with it."""
  options = router_rows.options_of(name, 16, 2, capacity=4)
  example = routing.ROUTERS[name].options.example(16, 2)
  assert example == {field: getattr(options, field) for field in example}
  assert options.num_selected_experts == {'base': 1, 'dense': 16}.get(name, 2)


def test_every_declared_field_is_of_a_router():
  every = {
    field for r in routing.ROUTERS.values() for field in router_options.own_fields(r.options)
  }
  assert every == router_options.declared().keys()
