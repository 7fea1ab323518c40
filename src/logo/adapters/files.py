"""The names of the files that adapters and pools are made of.

<pool>/pool.json                          what is known of the pool (`logo.adapters.notes`)
<pool>/<adapter>/adapter_config.json      PEFT's configuration
                 adapter_model.safetensors    PEFT's weights, or adapter_model.bin
                 examples.jsonl           example prompts (`logo.adapters.examples`)
                 training.json            how it was trained (`logo.training`)
"""

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
EXAMPLES = "examples.jsonl"
NOTES = "pool.json"
RECORD = "training.json"
