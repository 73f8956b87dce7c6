"""The gRPC interface: one method for each RPC, and the pipeline around them."""
