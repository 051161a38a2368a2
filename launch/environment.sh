# Sourced by ./launch/quickstart and ./launch/test: makes .venv and installs the project into it.
#
#   prepare_environment EXTRA...   installs with these extras; [cuda] or [tpu] is added if one is there
#   prepare_browser                finds or installs chromium and chromedriver
#   prepare_tex                    finds or installs pdflatex with booktabs and IEEEtran
#   prepare_devices                8 simulated devices where there is no accelerator, large arrays of
#                                  the host in huge pages

fail() {
  echo "error: $*" >&2
  exit 2
}

_find_python() {
  local name
  for name in "${PYTHON:-}" python3 python python3.14 python3.13 python3.12 python3.11; do
    if [ -n "$name" ] && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  fail "python: none of version 3.11 or newer found; name one with PYTHON=/path/to/python"
}

_accelerator_extra() {
  if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    echo cuda
  elif compgen -G '/dev/accel*' >/dev/null || [ -n "${TPU_NAME:-}" ]; then
    echo tpu
  fi
}

prepare_environment() {
  local accelerator wanted python extras
  accelerator=$(_accelerator_extra)
  extras=$(printf '%s\n' "$@" $accelerator | paste -sd,)
  if [ ! -x .venv/bin/python ] || ! .venv/bin/python -c '' 2>/dev/null; then
    python=$(_find_python) || exit 2
    echo "making .venv with $("$python" --version)"
    rm -rf .venv
    "$python" -m venv .venv || fail ".venv: cannot be made; is the venv module of Python installed?"
  fi
  # Installed once for each state of setup.cfg, each set of extras and each place of the checkout.
  wanted="$(cksum < setup.cfg) [$extras] $PWD"
  if [ "$(cat ".venv/installed-$extras" 2>/dev/null)" != "$wanted" ]; then
    echo "installing the project${extras:+ with [$extras]}: about 1.3 GB, once"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
      --editable ".${extras:+[$extras]}" || fail "pip: could not install the project"
    echo "$wanted" > ".venv/installed-$extras"
  fi
}

# What the tests of the report's page drive: Debian's packages, installed if we may.
prepare_browser() {
  if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then
    return
  fi
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing chromium and chromium-driver for the tests of the report's page"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      chromium chromium-driver; } >/dev/null 2>&1 || fail "apt-get: could not install chromium"
    return
  fi
  fail "chromium and chromedriver: not found, and the tests of the report's page need both;" \
    "install them, or leave these tests out with ./launch/test --fast"
}

# What the tests of table.tex compile with, likewise.
prepare_tex() {
  if command -v pdflatex >/dev/null && command -v bibtex >/dev/null &&
    kpsewhich booktabs.sty tabularx.sty article.cls IEEEtran.cls ptmr7t.tfm >/dev/null; then
    return
  fi
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing TeX Live with IEEEtran for the tests of table.tex"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      texlive-latex-recommended texlive-publishers texlive-fonts-recommended; } >/dev/null 2>&1 || fail "apt-get: could not install texlive"
    return
  fi
  fail "pdflatex, bibtex, booktabs or IEEEtran: not found, and the tests of table.tex need them; install" \
    "them, or leave these tests out with ./launch/test --fast"
}

prepare_devices() {
  export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}"
  # On CPUs a fifth to a quarter of a step went into page faults of 4 kB (experiments/LOG.md).
  export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
  if [ -z "$(_accelerator_extra)" ]; then
    export JAX_PLATFORMS=cpu
    export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=8"
  fi
}
