"""The command: parse and print. What is done lies in the layers below."""
