// A client in Node: creates a user and a session, appends, sends the append again, follows, lists, and meets an error.
//
//   node client.mjs ADDRESS DESCRIPTORS
//
// DESCRIPTORS is generated/chathistory.binpb: the whole API in one file. (protos/ alone does not do for proto-loader, since
// buf/validate/validate.proto exists only as a descriptor.) Prints what it got as JSON.

import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import process from "node:process";
import { promisify } from "node:util";
import grpc from "@grpc/grpc-js";
import { loadFileDescriptorSetFromBuffer } from "@grpc/proto-loader";

const [address, descriptors] = process.argv.slice(2);
const api = grpc.loadPackageDefinition(
  loadFileDescriptorSetFromBuffer(readFileSync(descriptors), { longs: Number, enums: String, defaults: true, oneofs: true }),
);
const { ChatHistoryService } = api.chathistory.v1;
const client = new ChatHistoryService(address, grpc.credentials.createInsecure());

/** Call a method that has one answer. */
const call = (name, request) => promisify(client[name].bind(client))(request);

/** Read so many messages of a stream, then leave it. */
async function follow(request, count) {
  const stream = client.watchMessages(request);
  const got = [];
  try {
    for await (const { message } of stream) {
      got.push(message);
      if (got.length === count) break;
    }
  } catch (error) {
    if (error.code !== grpc.status.CANCELLED) throw error;
  }
  stream.cancel();
  return got;
}

// protobufjs takes names from descriptors as they are, and makes no maps: the fields of a Struct are a list of keys and values.
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
const again = await call("appendMessages", append);
const followed = await follow({ user_id, session_id, after_seq: 0 }, 2);
const { messages } = await call("listMessages", { user_id, session_id });
const context = await call("getContext", { user_id, session_id });
let refused;
try {
  await call("getSession", { user_id, session_id: randomUUID() });
} catch (error) {
  refused = { code: error.code, details: error.details, status: error.metadata.get("grpc-status-details-bin").length };
}
client.close();
console.log(JSON.stringify({ user, session, appended, again, followed, messages, context, refused }));
