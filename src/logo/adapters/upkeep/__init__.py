"""Looking after a pool: what its adapters do, and pools that are made of it.

    spectra -> anatomy -> outliers, duplicates       what the updates are, how they compare, what stands out
    pruning, conversion                              the same adapters smaller, in another dtype, as plain LoRA
    differences                                      two pools side by side
    card, publishing                                 a description of a pool, and its way to the Hub

Nothing here is needed to answer a prompt. `logo pool` has a command for each.
"""
