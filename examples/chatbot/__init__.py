"""A chatbot backend that keeps its conversations in the ChatHistory service: FastAPI, with a web page."""
