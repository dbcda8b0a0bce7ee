"""Reading, splitting and providing the texts that effllm works on."""
