"""An instance of several processes: ranks that each hold a share of the model's heads and of its KV."""
