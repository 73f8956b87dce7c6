"""The wire: everything that knows gRPC or the generated code."""
