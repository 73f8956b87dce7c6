"""The chatbot's settings, read from the environment and a `.env` file."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from pydantic import AliasChoices, Field, PositiveFloat, PositiveInt, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """All settings. A variable is `CHATBOT_` plus the field's name, except if an alias is set."""

    model_config = SettingsConfigDict(
        env_prefix="CHATBOT_",
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        populate_by_name=True,
    )

    listen: str = "127.0.0.1:8000"
    """Address of the web page and the API, as `host:port`."""
    secret: SecretStr | None = None
    """Key that signs the identity cookie. Unset: generated once and stored in `data_dir`."""
    data_dir: Path = Field(
        default=Path(".data"),
        validation_alias=AliasChoices("CHATBOT_DATA_DIR", "CHAT_HISTORY_DATA_DIR"),
    )
    """Folder of the generated `secret`."""

    history_target: str = Field(
        default="127.0.0.1:50051",
        validation_alias=AliasChoices("CHATBOT_HISTORY_TARGET", "CHAT_HISTORY_LISTEN"),
    )
    """Address of the ChatHistory service, as `host:port`."""
    history_tls: bool = False
    """Whether to connect to the service with TLS."""
    history_token: SecretStr | None = None
    """The backend's service token. Not needed if the service runs with `CHAT_HISTORY_AUTH=none`."""
    history_timeout: PositiveFloat = 2.0
    """Seconds that one call to the service may take, retries included."""
    require_history: bool = False
    """Answer 503 while a turn cannot be stored, instead of answering with `saved: false`."""

    model: str | None = None
    """Name of the language model. Unset: answers quote the documents."""
    openai_base_url: str | None = Field(default=None, validation_alias="OPENAI_BASE_URL")
    """Base URL of an OpenAI-compatible endpoint. Unset: OpenAI's own."""
    openai_api_key: SecretStr | None = Field(default=None, validation_alias="OPENAI_API_KEY")
    """API key of that endpoint, if it requires one."""
    model_timeout: PositiveFloat = 60.0
    """Seconds to wait for the model's next chunk of output."""
    context_tokens: PositiveInt = 6000
    """Maximum tokens of a conversation that are sent to the model."""
    instructions: str = (
        "You are a helpful assistant. Answer briefly, in the language of the question."
    )
    """The system prompt."""

    def cookie_secret(self) -> str:
        """Return the key that signs cookies. After a change of key every user is a new user."""
        if self.secret is not None:
            return self.secret.get_secret_value()
        path = self.data_dir / "chatbot-secret"
        self.data_dir.mkdir(parents=True, exist_ok=True)
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(32))
        except FileExistsError:
            pass
        return path.read_text()
