"""Where the bytes come from: safetensors headers, the checkpoint's index, and reads of byte ranges."""
