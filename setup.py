from setuptools import setup

setup(
    name="zsar",
    version="0.1.0",
    description="Reference implementation of DVTA and TDSM for zero-shot skeleton-based action recognition",
    python_requires=">=3.10",
    py_modules=["zsar", "alignment", "diffusion", "data", "train"],
    install_requires=["torch>=2.4", "numpy"],
    extras_require={"test": ["pytest"], "plot": ["matplotlib"]},
)
