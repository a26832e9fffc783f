"""Run PEFT's own test suite on LocFT: `python tests/conformance/run.py [pytest options]`.

The source release that matches the installed PEFT is downloaded from the package index once; its files are not changed.
What is run, and what does not apply, is in `locft_conformance.py`.
"""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import peft


HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / ".conformance"
SUITES = ("test_custom_models.py", "test_decoder_models.py", "test_config.py", "test_lora_conversion.py")


def source() -> Path:
    """Return the folder of the source release of the installed PEFT, downloaded if it is not there."""
    name = f"peft-{peft.__version__}"
    folder = FOLDER / name
    if not (folder / "tests" / "__init__.py").is_file():
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-binary",
            "peft",
            "-d",
            str(FOLDER),
        ]
        subprocess.run([*command, f"peft=={peft.__version__}"], check=True)
        with tarfile.open(FOLDER / f"{name}.tar.gz") as archive:
            archive.extractall(FOLDER, filter="data")
        (folder / "tests" / "__init__.py").touch()
    return folder


def main() -> int:
    folder = source()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(folder)]),
        "LOCFT_CONFORMANCE_MODELS": str(FOLDER / "models"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # the models are tiny
    }
    # `-c` keeps PEFT's own pytest options out, which ask for a coverage report.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "locft_conformance", "-c", os.devnull, "--rootdir", "."]
    command += ["-W", "ignore", "-rfE", *sys.argv[1:], *(f"tests/{suite}" for suite in SUITES)]
    return subprocess.run(command, cwd=folder, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
