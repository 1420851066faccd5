"""vLLM engines in processes of their own, for whatever measures or checks them."""
