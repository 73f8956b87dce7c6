// A client in Node: creates a user and a session, appends, repeats the append, watches, lists, and
// reads an error.
//
//   node client.mjs ADDRESS DESCRIPTORS
//
// DESCRIPTORS is generated/chathistory.binpb, the whole API in one file. proto-loader cannot load
// protos/ itself, because buf/validate/validate.proto exists only as a descriptor. Prints the
// results as JSON.

import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import process from "node:process";
import { promisify } from "node:util";
import grpc from "@grpc/grpc-js";
import { loadFileDescriptorSetFromBuffer } from "@grpc/proto-loader";

const [address, descriptors] = process.argv.slice(2);
const api = grpc.loadPackageDefinition(
  loadFileDescriptorSetFromBuffer(readFileSync(descriptors), {
    longs: Number,
    enums: String,
    defaults: true,
    oneofs: true,
  }),
);
const { ChatHistoryService } = api.chathistory.v1;
const client = new ChatHistoryService(address, grpc.credentials.createInsecure());

/** Make a unary call. */
const call = (name, request) => promisify(client[name].bind(client))(request);

/** Read `count` messages of a stream, then cancel it. */
async function watch(request, count) {
  const stream = client.watchMessages(request);
  const received = [];
  try {
    for await (const { message } of stream) {
      received.push(message);
      if (received.length === count) break;
    }
  } catch (error) {
    if (error.code !== grpc.status.CANCELLED) throw error;
  }
  stream.cancel();
  return received;
}

// protobufjs keeps the field names of descriptors and supports no maps, so the fields of a Struct
// are a list of keys and values.
const metadata = { fields: [{ key: "lang", value: { string_value: "js" } }] };
const { user } = await call("createUser", { user: { name: "Node", metadata } });
const user_id = user.id;
const { session } = await call("createSession", { user_id, session: { title: "from Node" } });
const session_id = session.id;
const append = {
  user_id,
  session_id,
  messages: [
    { id: randomUUID(), role: "ROLE_USER", content: "Grüße, 世界 🌍" },
    {
      id: randomUUID(),
      role: "ROLE_ASSISTANT",
      content: "",
      parts: [{ tool_call: { id: "call-1", name: "weather", arguments: '{"city": "Berlin"}' } }],
    },
  ],
};
const appended = await call("appendMessages", append);
const repeated = await call("appendMessages", append);
const watched = await watch({ user_id, session_id, after_seq: 0 }, 2);
const { messages } = await call("listMessages", { user_id, session_id });
const context = await call("getContext", { user_id, session_id });
let failure;
try {
  await call("getSession", { user_id, session_id: randomUUID() });
} catch (error) {
  const status = error.metadata.get("grpc-status-details-bin").length;
  failure = { code: error.code, details: error.details, status };
}
client.close();
const results = { user, session, appended, repeated, watched, messages, context, error: failure };
console.log(JSON.stringify(results));
