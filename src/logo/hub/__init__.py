"""What models, adapters and data need of the Hugging Face Hub.

Parallel downloads, retries, the cache, tokens and the `HF_*` variables are `huggingface_hub`'s, which is imported
inside functions so that `logo --help` stays fast.
"""
