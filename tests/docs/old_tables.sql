CREATE TABLE users (id serial PRIMARY KEY, email text, created_at timestamptz DEFAULT now());
CREATE TABLE chat_sessions (
    id serial PRIMARY KEY, user_id int, title text, created_at timestamp, updated_at timestamp
);
CREATE TABLE chat_messages (
    id serial PRIMARY KEY, session_id int, role text, content text, created_at timestamp
);
INSERT INTO users (email) VALUES ('old@example.com');
INSERT INTO chat_sessions (user_id, title, created_at, updated_at)
    VALUES (1, 'Herons', '2021-03-04 05:06:07', '2021-03-05');
INSERT INTO chat_messages (session_id, role, content, created_at) VALUES
    (1, 'assistant', 'A wading bird.', '2021-03-04 05:06:09'),
    (1, 'user', 'What is a heron?', '2021-03-04 05:06:08')
