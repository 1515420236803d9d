"""Fast twins of what mamba2.py writes in plain PyTorch: same functions, same signatures, loaded when used."""
