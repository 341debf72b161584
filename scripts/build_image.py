"""Build the image on a machine without Docker: buildah in a chroot, on a base that debootstrap makes.

Needs root and `scripts/tools.sh --image`; the first build takes some ten minutes and 5 GB in build/image, as every
stage is a plain folder (buildah's vfs storage). What pip is told on this machine (index, certificate, local folders)
it is told in the build, by the Dockerfile's secrets. Elsewhere `docker build .` does the same.

    python -m scripts.build_image
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "image"
TOOLS = ("buildah", "debootstrap", "bwrap")
BASE, IMAGE = "localhost/redraft-base:bookworm", "localhost/redraft:test"
BASE_PACKAGES = "python3,python3-venv,ca-certificates"
CA_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")


class CannotBuild(Exception):
    """This machine is not one that can build an image; the message says what is missing."""


class BuildFailed(Exception):
    """A step failed; the message is the end of its output."""


@dataclass(frozen=True)
class Image:
    """A built image: its configuration, as OCI has it, and its file system, mounted."""

    config: dict[str, Any]
    root: Path


def build(folder: Path = FOLDER) -> Image:
    """Build the base (once) and the image from the working tree.

    Raises:
        CannotBuild: without root, the tools, or a Debian mirror.
        BuildFailed: if the Dockerfile does not build.
    """
    if os.geteuid() != 0:
        raise CannotBuild("building in a chroot needs root")
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        raise CannotBuild(f"no {', '.join(absent)}: run `scripts/tools.sh --image`")
    folder.mkdir(parents=True, exist_ok=True)
    if not buildah(folder, "images", "--quiet", "--filter", f"reference={BASE}"):
        make_base(folder)
    secrets, volumes = pip_settings(folder)
    arguments = [f"--build-arg=BASE_IMAGE={BASE}", f"--build-arg=REVISION={revision()}", f"--tag={IMAGE}"]
    buildah(folder, "bud", "--isolation=chroot", "--layers=false", *arguments, *secrets, *volumes, str(ROOT))
    config = json.loads(buildah(folder, "inspect", "--type=image", IMAGE))["OCIv1"]["config"]
    container = buildah(folder, "from", "--pull-never", IMAGE)
    return Image(config, Path(buildah(folder, "mount", container)))


def make_base(folder: Path) -> None:
    """Debian with Python, from this machine's mirror."""
    system = folder / "system"
    shutil.rmtree(system, ignore_errors=True)
    try:
        # In a mount namespace of its own: what debootstrap mounts goes away with it, even if it is killed.
        debootstrap = ("unshare", "--mount", "debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}")
        run(*debootstrap, "bookworm", str(system))
    except BuildFailed as error:
        raise CannotBuild(f"debootstrap: {error}") from None
    context = folder / "base"
    context.mkdir(exist_ok=True)
    run("tar", "-C", str(system), "--exclude=./var/cache/apt/archives/*.deb", "-cf", str(context / "base.tar"), ".")
    (context / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
    buildah(folder, "bud", "--isolation=chroot", f"--tag={BASE}", str(context))
    shutil.rmtree(system)
    (context / "base.tar").unlink()


def pip_settings(folder: Path) -> tuple[list[str], list[str]]:
    """The secrets `pip` and `ca`, and the volumes with the local folders that pip is pointed to."""
    listed = run(sys.executable, "-m", "pip", "config", "list").splitlines()
    settings = {
        name.split(".", 1)[1]: ast.literal_eval(value) for name, value in (line.split("=", 1) for line in listed)
    }
    ca = settings.pop("cert", None) or next((path for path in CA_BUNDLES if Path(path).is_file()), None)
    places = [Path(word.removeprefix("file://")) for value in settings.values() for word in value.split()]
    # the pages of an index, by convention in a folder `simple`, link to files beside it
    folders = {place.parent if place.name == "simple" else place for place in places if place.is_absolute()}
    volumes = [f"--volume={folder}:{folder}:ro" for folder in sorted(folders) if folder.exists()]
    if ca is not None:
        settings["cert"] = "/run/secrets/ca"
    conf = folder / "pip.conf"
    lines = [f"{name} = {' '.join(value.split())}" for name, value in settings.items()]
    conf.write_text("\n".join(["[global]", *lines]) + "\n")
    return [f"--secret=id=pip,src={conf}", *([f"--secret=id=ca,src={ca}"] if ca else [])], volumes


def revision() -> str:
    """The commit that is checked out, whatever has been changed since."""
    return run("git", "-C", str(ROOT), "rev-parse", "HEAD")


def buildah(folder: Path, *arguments: str) -> str:
    """With storage of its own, so that nothing is left in, or taken from, the machine's."""
    store = ("--root", str(folder / "store"), "--runroot", str(folder / "run"), "--storage-driver", "vfs")
    return run("buildah", *store, *arguments)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        output = (done.stdout + done.stderr).strip().splitlines()
        raise BuildFailed(f"{command[0]} ended with {done.returncode}:\n" + "\n".join(output[-20:]))
    return done.stdout.strip()


def main() -> int:
    try:
        image = build()
    except (CannotBuild, BuildFailed) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{IMAGE}, its file system is in {image.root}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
