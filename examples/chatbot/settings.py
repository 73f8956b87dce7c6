"""The chatbot's settings, from the environment and a `.env` file."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from pydantic import AliasChoices, Field, PositiveFloat, PositiveInt, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Every setting; each is `CHATBOT_` and its name, but for those with an alias."""

    model_config = SettingsConfigDict(
        env_prefix="CHATBOT_",
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        populate_by_name=True,
    )

    listen: str = "127.0.0.1:8000"
    """Where the web page is."""
    secret: SecretStr | None = None
    """Signs the cookie that says who somebody is. Unset: made once and kept in `data_dir`."""
    data_dir: Path = Field(
        default=Path(".data"),
        validation_alias=AliasChoices("CHATBOT_DATA_DIR", "CHAT_HISTORY_DATA_DIR"),
    )
    """Where that secret is kept."""

    history_target: str = Field(
        default="127.0.0.1:50051",
        validation_alias=AliasChoices("CHATBOT_HISTORY_TARGET", "CHAT_HISTORY_LISTEN"),
    )
    """The ChatHistory service."""
    history_tls: bool = False
    """Whether to talk TLS to it."""
    history_token: SecretStr | None = None
    """The backend's own service token; none is needed where the service has `CHAT_HISTORY_AUTH=none`."""
    history_timeout: PositiveFloat = 2.0
    """Seconds that each question to the service may take."""
    require_history: bool = False
    """Whether to refuse to answer (503) what cannot be saved, instead of answering with `saved: false`."""

    model: str | None = None
    """The language model; unset, the answer is what the documents say."""
    openai_base_url: str | None = Field(default=None, validation_alias="OPENAI_BASE_URL")
    """Any OpenAI-compatible endpoint; unset: OpenAI's own."""
    openai_api_key: SecretStr | None = Field(default=None, validation_alias="OPENAI_API_KEY")
    """Its key, where it wants one."""
    model_timeout: PositiveFloat = 60.0
    """Seconds that the model may be silent."""
    context_tokens: PositiveInt = 6000
    """How much of a conversation the model gets to see."""
    instructions: str = (
        "You are a helpful assistant. Answer briefly, in the language of the question."
    )
    """The system prompt."""

    def cookie_secret(self) -> str:
        """Return the secret that signs cookies; it must stay the same for people to stay who they are."""
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
