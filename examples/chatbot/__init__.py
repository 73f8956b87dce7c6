"""A FastAPI chatbot with a web page that stores its conversations in the ChatHistory service."""
