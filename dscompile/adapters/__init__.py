"""Optional pieces for users of other libraries: `torch.compile(model, backend="dsinfra")` needs none of them."""
