"""`python -m service`: the same as the `chat-history` command."""

from service.cli import main

main()
