"""The package's metadata. The tools' settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "src/peft_locft/__init__.py").read_text("utf-8"), re.M)[1]

# Lower bounds: the oldest versions that the test suite was run with.
REQUIRED = [
    "accelerate>=1.15.0",
    "datasets>=5.2.0",
    "huggingface-hub>=2.4.0",
    "packaging",
    "peft>=0.21.2",
    "pyarrow",
    "pyyaml",
    "regex",
    "rich",
    "safetensors",
    "torch>=2.13.0",
    "tqdm",
    "transformers>=5.23.0",
    "trl>=1.16.0",
]
PLOTS = ["matplotlib>=3.8"]
DEMO = [*PLOTS, "gguf>=0.10"]
DOCS = ["furo", "myst-parser", "sphinx>=8"]
QUANTIZATION = ["bitsandbytes>=0.50", "torchao>=0.18"]
DEV = [*DEMO, *DOCS, "ipykernel", "nbclient", "nbformat", "pytest>=8", "pytest-xdist>=3.6", "ruff>=0.9"]

setup(
    name="peft-locft",
    version=VERSION,
    description="Teach a language model new facts and keep the rest of it as it was: LocFT-BF as a PEFT method",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    author="The peft-locft authors",
    keywords="model editing, knowledge editing, PEFT, fine-tuning, LocFT, transformers, LLM",
    package_dir={"": "src"},
    packages=find_packages("src"),
    py_modules=["locft"],
    package_data={"peft_locft": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=REQUIRED,
    extras_require={"plots": PLOTS, "demo": DEMO, "docs": DOCS, "quantization": QUANTIZATION, "dev": DEV},
    entry_points={"console_scripts": ["locft=locft:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
