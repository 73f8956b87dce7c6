"""Version 1 of the ChatHistory API. Generated from protos/ by `make proto`: do not edit."""
