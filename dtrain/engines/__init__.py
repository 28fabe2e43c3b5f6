"""Who holds the model: ddp, fsdp2 and DeepSpeed's ZeRO behind one protocol."""
