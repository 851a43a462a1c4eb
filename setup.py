"""Two packages from one tree: `g2rl_kernels` (the ops) and `g2rl` (the trainer, below python/)."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["g2rl_kernels", "g2rl_kernels.*"]),
        *find_packages("python", include=["g2rl", "g2rl.*"]),
    ],
    package_dir={"g2rl_kernels": "g2rl_kernels", "g2rl": "python/g2rl"},
    package_data={"g2rl_kernels": ["MATH.md", "py.typed"], "g2rl": ["py.typed"]},
)
