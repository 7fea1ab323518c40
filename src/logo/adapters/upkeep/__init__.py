"""Maintenance of pools: analyses of their adapters, and pools that are made from them.

    spectra -> anatomy -> outliers, duplicates       singular values, comparisons, unusual adapters, near-duplicates
    pruning, conversion                              the same adapters smaller, in another dtype, as plain LoRA
    differences                                      two pools side by side
    card, publishing                                 a description of a pool, and its upload to the Hub

Nothing here is needed to answer a prompt. `logo pool` has a command for each.
"""
