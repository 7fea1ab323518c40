"""Access to the Hugging Face Hub for models, adapters and datasets.

Parallel downloads, retries, the cache, tokens and the `HF_*` variables are `huggingface_hub`'s, which is imported
inside functions so that `logo --help` stays fast.
"""
