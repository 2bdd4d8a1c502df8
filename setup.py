"""What pyproject.toml cannot say: configs/ lies beside the package here, and inside it in a wheel."""

from setuptools import find_namespace_packages, find_packages, setup

CONFIGS = ["qgalore.configs", *(f"qgalore.configs.{folder}" for folder in find_namespace_packages("configs"))]

setup(
    packages=[*find_packages(include=["qgalore", "qgalore.*"]), *CONFIGS],
    package_dir={"qgalore.configs": "configs"},
    package_data={"qgalore": ["py.typed"], "qgalore.convergence": ["page.js"], **{name: ["*"] for name in CONFIGS}},
)
