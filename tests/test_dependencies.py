"""What the package needs of a machine besides Python."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

# Imports every module, then prints the files that the process has mapped.
IMPORT_ALL = """
import importlib, pathlib, pkgutil
import aligndet_cli
for module in pkgutil.walk_packages(aligndet_cli.__path__, "aligndet_cli."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(*{line.split(maxsplit=5)[-1] for line in pathlib.Path("/proc/self/maps").read_text().splitlines()}, sep="\\n")
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of mapped files here")
def test_importing_every_module_loads_no_graphics_library() -> None:
    """Slim containers have none of them, and OpenCV's build with windows does not load without."""
    try:
        importlib.metadata.version("opencv-contrib-python-headless")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("another build of OpenCV is installed than the one this package depends on")
    ran = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=True)
    mapped = {Path(line.strip()).name.split(".")[0] for line in ran.stdout.splitlines()}
    assert "cv2" in mapped and "libc" in mapped
    assert not mapped & {"libGL", "libGLX", "libEGL", "libX11", "libgthread-2", "libglib-2", "libgtk-3"}
