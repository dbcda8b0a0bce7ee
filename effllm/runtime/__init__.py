"""Running models and answering with them. Only `torch.py` imports torch."""
