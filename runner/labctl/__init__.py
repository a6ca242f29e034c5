"""labctl: disposable compute and durable data for a machine-learning lab on Chameleon."""

__version__ = "0.1.0"
