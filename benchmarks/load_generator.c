/* Load: keeps so many requests in flight (callers, each of which asks again when it is answered), or with --rate sends so many a second
 * whatever is answered (then --in-flight is the most that may be open). Each has a body of its own; every reply's status is looked at.
 * What the server does not let onto a connection yet (SETTINGS_MAX_CONCURRENT_STREAMS) waits here.
 * With --patient a caller that is refused with a RetryInfo waits for as long as that says.
 *
 *   driver --address 127.0.0.1:50051 --path /chathistory.v1.ChatHistoryService/AppendMessages --bodies FILE --in-flight 64
 *          [--connections 8] [--warmup 0.5] [--seconds 3] [--cycle] [--header name:value]... [--pid PID]... [--http1]
 *          [--patient] [--rate 1000]
 *
 * FILE holds records of a 32-bit little-endian length and so many bytes. With gRPC a record is one request message; with --http1 it is
 * one whole HTTP/1.1 request, and every connection carries one request at a time. A record is sent once, unless --cycle.
 *
 * Prints one JSON object: the good replies in the window that follows the warm-up and how long they took, how many others there were in
 * it, the statuses of all replies (also of those outside the window), the processor time of this process and of each --pid during the
 * window.
 *
 * HTTP/2 is libnghttp2's work. One thread, one epoll loop.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <nghttp2/nghttp2.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { STATUSES = 600, NO_STATUS = STATUSES - 1, MAX_PIDS = 8, MAX_HEADERS = 16, WINDOW = 1 << 24, PREFIX = 5, BUFFER = 1 << 18, SHOWN = 3 };
enum { DRAIN_SECONDS = 30 };

typedef struct connection connection;

typedef struct stream {
  connection *owner;
  const uint8_t *body;
  uint32_t length, sent;
  uint64_t started;
  int status, http_status;
  uint64_t reply_bytes, retry_after;
  struct stream *next;
} stream;

/* A caller that waits before it asks again. */
typedef struct rest {
  uint64_t until;
  connection *of;
} rest;

struct connection {
  int fd;
  nghttp2_session *session;
  bool wants_out;
  uint8_t *out; /* What the socket did not take yet. */
  size_t out_length, out_at, out_room;
  int in_flight, resting;
  stream *done; /* Streams that have ended and are free. */
  /* HTTP/1.1: the reply that is being read. */
  uint8_t *in;
  size_t in_length, in_room;
  stream *current;
};

static const char *path, *authority;
static nghttp2_nv headers[MAX_HEADERS];
static size_t header_count;
static uint8_t *bodies;
static size_t bodies_length, body_at;
static bool cycle, http1, stopping, patient;
static rest *resting; /* A heap, the first to end on top. */
static size_t resting_count, resting_room;
static uint64_t due, window_start, window_end, replies_in_window, refused_in_window, bytes_in_window, sent_total, statuses[STATUSES];
static uint32_t *latencies;
static size_t latency_room, outstanding;
static int epoll_fd, shown;

static void die(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fprintf(stderr, "driver: ");
  vfprintf(stderr, format, arguments);
  fprintf(stderr, "\n");
  va_end(arguments);
  exit(1);
}

static void *grow(void *memory, size_t bytes) {
  void *grown = realloc(memory, bytes);
  if (grown == NULL) die("out of memory");
  return grown;
}

static uint64_t now_ns(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static double process_seconds(int pid) {
  char name[64], text[1024];
  snprintf(name, sizeof name, "/proc/%d/stat", pid);
  int fd = open(name, O_RDONLY);
  if (fd < 0) die("process %d is gone", pid);
  ssize_t length = read(fd, text, sizeof text - 1);
  close(fd);
  text[length > 0 ? length : 0] = 0;
  const char *rest = strrchr(text, ')'); /* The name may hold anything. */
  unsigned long user, system;
  if (rest == NULL || sscanf(rest + 2, "%*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &system) != 2)
    die("cannot read %s", name);
  return (double)(user + system) / (double)sysconf(_SC_CLK_TCK);
}

static double own_seconds(void) {
  struct rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) + (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

static void take_body(stream *request) {
  if (body_at >= bodies_length) {
    if (!cycle) die("out of bodies: all %llu have been sent", (unsigned long long)sent_total);
    body_at = 0;
  }
  uint32_t length;
  memcpy(&length, bodies + body_at, 4);
  request->body = bodies + body_at + 4;
  request->length = length;
  body_at += 4 + (size_t)length;
}

static stream *new_stream(connection *owner) {
  stream *request = owner->done;
  if (request != NULL)
    owner->done = request->next;
  else
    request = grow(NULL, sizeof *request);
  memset(request, 0, sizeof *request);
  request->owner = owner;
  request->status = NO_STATUS;
  take_body(request);
  request->started = now_ns();
  owner->in_flight++;
  outstanding++;
  sent_total++;
  return request;
}

static void begin_rest(connection *of, uint64_t until) {
  if (resting_count == resting_room) {
    resting_room = resting_room ? resting_room * 2 : 1 << 12;
    resting = grow(resting, resting_room * sizeof *resting);
  }
  size_t at = resting_count++;
  for (size_t parent; at > 0 && resting[parent = (at - 1) / 2].until > until; at = parent) resting[at] = resting[parent];
  resting[at] = (rest){until, of};
  of->resting++;
}

static connection *end_rest(void) {
  connection *of = resting[0].of;
  rest last = resting[--resting_count];
  size_t at = 0;
  for (size_t child; (child = 2 * at + 1) < resting_count; at = child) {
    if (child + 1 < resting_count && resting[child + 1].until < resting[child].until) child++;
    if (resting[child].until >= last.until) break;
    resting[at] = resting[child];
  }
  resting[at] = last;
  of->resting--;
  return of;
}

static bool is_good(const stream *reply) { return reply->status == (http1 ? 200 : 0); }

static void end_stream(stream *reply) {
  connection *owner = reply->owner;
  uint64_t now = now_ns();
  statuses[reply->status]++;
  if (patient && reply->retry_after && !stopping) begin_rest(owner, now + reply->retry_after);
  if (now >= window_start && now < window_end && !is_good(reply)) refused_in_window++;
  if (now >= window_start && now < window_end && is_good(reply)) {
    if (replies_in_window == latency_room) {
      latency_room = latency_room ? latency_room * 2 : 1 << 16;
      latencies = grow(latencies, latency_room * sizeof *latencies);
    }
    uint64_t microseconds = (now - reply->started) / 1000;
    latencies[replies_in_window++] = microseconds > UINT32_MAX ? UINT32_MAX : (uint32_t)microseconds;
    bytes_in_window += reply->reply_bytes;
  }
  owner->in_flight--;
  outstanding--;
  reply->next = owner->done;
  owner->done = reply;
}

/* -- sending what is queued, for both protocols -- */

static void queue(connection *to, const uint8_t *data, size_t length) {
  if (to->out_length + length > to->out_room) {
    to->out_room = (to->out_length + length) * 2;
    to->out = grow(to->out, to->out_room);
  }
  memcpy(to->out + to->out_length, data, length);
  to->out_length += length;
}

static void flush(connection *to) {
  while (to->out_at < to->out_length) {
    ssize_t written = write(to->fd, to->out + to->out_at, to->out_length - to->out_at);
    if (written < 0) {
      if (errno == EAGAIN) break;
      die("the server closed a connection: %s", strerror(errno));
    }
    to->out_at += (size_t)written;
  }
  bool more = to->out_at < to->out_length;
  if (!more) to->out_at = to->out_length = 0;
  if (more != to->wants_out) {
    to->wants_out = more;
    struct epoll_event event = {.events = EPOLLIN | (more ? EPOLLOUT : 0), .data.ptr = to};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, to->fd, &event);
  }
}

/* -- gRPC -- */

static ssize_t read_body(nghttp2_session *session, int32_t id, uint8_t *to, size_t room, uint32_t *flags, nghttp2_data_source *source,
                         void *user) {
  (void)session, (void)id, (void)user;
  stream *request = source->ptr;
  const uint32_t whole = request->length + PREFIX;
  const uint8_t prefix[PREFIX] = {0, (uint8_t)(request->length >> 24), (uint8_t)(request->length >> 16),
                                  (uint8_t)(request->length >> 8), (uint8_t)request->length};
  size_t copied = 0;
  while (copied < room && request->sent < whole) {
    if (request->sent < PREFIX) {
      to[copied++] = prefix[request->sent++];
      continue;
    }
    size_t left = whole - request->sent, take = left < room - copied ? left : room - copied;
    memcpy(to + copied, request->body + (request->sent - PREFIX), take);
    copied += take;
    request->sent += (uint32_t)take;
  }
  if (request->sent == whole) *flags |= NGHTTP2_DATA_FLAG_EOF;
  return (ssize_t)copied;
}

static void add_header(const char *name, const char *value) {
  if (header_count == MAX_HEADERS) die("too many --header");
  headers[header_count++] = (nghttp2_nv){(uint8_t *)name, (uint8_t *)value, strlen(name), strlen(value),
                                         NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE};
}

/* What every call carries; a deadline among it, as a client should set one. */
static void add_common_headers(void) {
  add_header(":method", "POST");
  add_header(":scheme", "http");
  add_header(":path", path);
  add_header(":authority", authority);
  add_header("te", "trailers");
  add_header("content-type", "application/grpc");
  add_header("grpc-timeout", "30S");
  add_header("user-agent", "chat-history-bench");
}

static void call(connection *to) {
  stream *request = new_stream(to);
  nghttp2_data_provider body = {.source.ptr = request, .read_callback = read_body};
  int32_t id = nghttp2_submit_request(to->session, NULL, headers, header_count, &body, request);
  if (id < 0) die("cannot send a request: %s", nghttp2_strerror(id));
}

static const uint8_t *find(const uint8_t *in, size_t length, const char *what) {
  return memmem(in, length, what, strlen(what));
}

static uint64_t read_varint(const uint8_t **at, const uint8_t *end) {
  uint64_t value = 0;
  for (int shift = 0; *at < end && shift < 64; shift += 7) {
    uint8_t byte = *(*at)++;
    value |= (uint64_t)(byte & 0x7f) << shift;
    if (byte < 0x80) break;
  }
  return value;
}

/* Returns the nanoseconds that the RetryInfo of a google.rpc.Status says, given in base64; 0 without one. */
static uint64_t read_retry_after(const uint8_t *text, size_t length) {
  uint8_t data[2048];
  size_t count = 0;
  uint32_t bits = 0;
  for (size_t n = 0; n < length && count < sizeof data; n++) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const char *digit = memchr(digits, text[n], 64);
    if (digit == NULL) break;
    bits = bits << 6 | (uint32_t)(digit - digits);
    if (n % 4) data[count++] = (uint8_t)(bits >> (6 - n % 4 * 2));
  }
  const uint8_t *end = data + count, *at = find(data, count, "google.rpc.RetryInfo");
  if (at == NULL) return 0;
  at += strlen("google.rpc.RetryInfo");
  /* The Any's value, in it the delay, in it seconds and nanoseconds. */
  if (end - at < 4 || at[0] != 0x12 || at[2] != 0x0a) return 0;
  at += 4;
  uint64_t delay = 0;
  while (at < end) {
    uint8_t key = *at++;
    if (key != 0x08 && key != 0x10) break;
    delay += read_varint(&at, end) * (key == 0x08 ? 1000000000u : 1u);
  }
  return delay;
}

static int on_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name, size_t name_length, const uint8_t *value,
                     size_t length, uint8_t flags, void *user) {
  (void)flags, (void)user;
  stream *reply = nghttp2_session_get_stream_user_data(session, frame->hd.stream_id);
  if (reply == NULL) return 0;
  if (name_length == 11 && memcmp(name, "grpc-status", 11) == 0) {
    int status = atoi((const char *)value);
    reply->status = status >= 0 && status < NO_STATUS ? status : NO_STATUS;
  } else if (name_length == 7 && memcmp(name, ":status", 7) == 0) {
    reply->http_status = atoi((const char *)value);
  } else if (patient && name_length == 23 && memcmp(name, "grpc-status-details-bin", 23) == 0) {
    reply->retry_after = read_retry_after(value, length);
  } else if (name_length == 12 && memcmp(name, "grpc-message", 12) == 0 && length && shown < SHOWN) {
    shown++;
    fprintf(stderr, "driver: a reply says: %.*s\n", (int)length, (const char *)value);
  }
  return 0;
}

static int on_data(nghttp2_session *session, uint8_t flags, int32_t id, const uint8_t *data, size_t length, void *user) {
  (void)flags, (void)data, (void)user;
  stream *reply = nghttp2_session_get_stream_user_data(session, id);
  if (reply != NULL) reply->reply_bytes += length;
  return 0;
}

static int on_close(nghttp2_session *session, int32_t id, uint32_t error, void *user) {
  (void)user;
  stream *reply = nghttp2_session_get_stream_user_data(session, id);
  if (reply == NULL) return 0;
  /* OK without a message is no reply of a unary call. */
  if (error != NGHTTP2_NO_ERROR || reply->http_status != 200 || (reply->status == 0 && reply->reply_bytes < PREFIX))
    reply->status = NO_STATUS;
  end_stream(reply);
  return 0;
}

/* A call counts from when it leaves: one that the server's limit of calls on a connection holds back waits here, as in any client. */
static int on_sent(nghttp2_session *session, const nghttp2_frame *frame, void *user) {
  (void)user;
  stream *request = frame->hd.type == NGHTTP2_HEADERS ? nghttp2_session_get_stream_user_data(session, frame->hd.stream_id) : NULL;
  if (request != NULL) request->started = now_ns();
  return 0;
}

static void open_session(connection *made) {
  nghttp2_session_callbacks *callbacks;
  nghttp2_session_callbacks_new(&callbacks);
  nghttp2_session_callbacks_set_on_frame_send_callback(callbacks, on_sent);
  nghttp2_session_callbacks_set_on_header_callback(callbacks, on_header);
  nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, on_data);
  nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, on_close);
  if (nghttp2_session_client_new(&made->session, callbacks, made) != 0) die("out of memory");
  nghttp2_session_callbacks_del(callbacks);
  const nghttp2_settings_entry settings[] = {{NGHTTP2_SETTINGS_ENABLE_PUSH, 0}, {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, WINDOW}};
  nghttp2_submit_settings(made->session, NGHTTP2_FLAG_NONE, settings, 2);
  nghttp2_session_set_local_window_size(made->session, NGHTTP2_FLAG_NONE, 0, WINDOW);
}

static void send_frames(connection *to) {
  const uint8_t *data;
  ssize_t length;
  while ((length = nghttp2_session_mem_send(to->session, &data)) > 0) queue(to, data, (size_t)length);
  if (length < 0) die("HTTP/2: %s", nghttp2_strerror((int)length));
}

/* -- HTTP/1.1 -- */

static void request(connection *to) {
  to->current = new_stream(to);
  queue(to, to->current->body, to->current->length);
}

static void read_reply(connection *from, const uint8_t *data, size_t length) {
  if (from->in_length + length + 1 > from->in_room) {
    from->in_room = (from->in_length + length + 1) * 2;
    from->in = grow(from->in, from->in_room);
  }
  memcpy(from->in + from->in_length, data, length);
  from->in_length += length;
  from->in[from->in_length] = 0;
  const char *text = (const char *)from->in, *end = strstr(text, "\r\n\r\n"), *size = strcasestr(text, "\r\ncontent-length:");
  if (end == NULL) return;
  if (size == NULL || size > end) die("a reply has no content-length");
  size_t head = (size_t)(end + 4 - text), whole = head + (size_t)atol(size + 17);
  if (from->in_length < whole) return;
  if (from->in_length > whole || from->current == NULL) die("a reply is longer than it says");
  int status = atoi(text + 9);
  from->current->status = status > 0 && status < NO_STATUS ? status : NO_STATUS;
  from->current->reply_bytes = whole - head;
  if (status >= 400 && shown++ < SHOWN) fprintf(stderr, "driver: a reply says: %s\n", end + 4);
  from->in_length = 0;
  end_stream(from->current);
  from->current = NULL;
}

/* -- the loop -- */

static void fill(connection *to, int wanted) {
  while (!stopping && to->in_flight + to->resting < wanted) {
    if (http1)
      request(to);
    else
      call(to);
  }
  if (!http1) send_frames(to);
  flush(to);
}

static void receive(connection *from) {
  static uint8_t buffer[BUFFER];
  ssize_t length = read(from->fd, buffer, sizeof buffer);
  if (length < 0 && errno == EAGAIN) return;
  if (length <= 0) die("the server closed a connection");
  if (http1) {
    read_reply(from, buffer, (size_t)length);
    return;
  }
  ssize_t taken = nghttp2_session_mem_recv(from->session, buffer, (size_t)length);
  if (taken < 0) die("HTTP/2: %s", nghttp2_strerror((int)taken));
  if (!nghttp2_session_want_read(from->session)) die("the server ended a connection");
}

static void connect_to(connection *made, const struct sockaddr_in *address) {
  made->fd = socket(AF_INET, SOCK_STREAM, 0);
  if (made->fd < 0 || connect(made->fd, (const struct sockaddr *)address, sizeof *address) != 0) die("cannot connect: %s", strerror(errno));
  int on = 1;
  setsockopt(made->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  fcntl(made->fd, F_SETFL, O_NONBLOCK);
  if (!http1) open_session(made);
  struct epoll_event event = {.events = EPOLLIN, .data.ptr = made};
  epoll_ctl(epoll_fd, EPOLL_CTL_ADD, made->fd, &event);
}

static void load_bodies(const char *name) {
  int fd = open(name, O_RDONLY);
  struct stat info;
  if (fd < 0 || fstat(fd, &info) != 0 || info.st_size == 0) die("cannot read %s", name);
  bodies_length = (size_t)info.st_size;
  bodies = mmap(NULL, bodies_length, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0);
  if (bodies == MAP_FAILED) die("cannot map %s", name);
  close(fd);
}

static int by_value(const void *left, const void *right) {
  uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;
  return (a > b) - (a < b);
}

static uint32_t quantile(double share) {
  if (replies_in_window == 0) return 0;
  return latencies[(size_t)(share * (double)(replies_in_window - 1) + 0.5)];
}

static int share(int index, int in_flight, int connections) { return in_flight / connections + (index < in_flight % connections); }

int main(int count, char **arguments) {
  int in_flight = 1, connections = 1, pids[MAX_PIDS], pid_count = 0, extra_count = 0, option;
  double warmup = 0.5, seconds = 3, rate = 0, pid_seconds[MAX_PIDS] = {0}, own = 0;
  const char *file = NULL, *extra[MAX_HEADERS / 2][2];
  static const struct option options[] = {
      {"address", 1, 0, 'a'}, {"path", 1, 0, 'p'},    {"bodies", 1, 0, 'b'}, {"in-flight", 1, 0, 'n'}, {"connections", 1, 0, 'c'},
      {"warmup", 1, 0, 'w'},  {"seconds", 1, 0, 's'}, {"cycle", 0, 0, 'y'},  {"pid", 1, 0, 'i'},       {"http1", 0, 0, '1'},
      {"header", 1, 0, 'h'},  {"patient", 0, 0, 't'}, {"rate", 1, 0, 'r'},   {0, 0, 0, 0},
  };
  while ((option = getopt_long(count, arguments, "", options, NULL)) != -1) switch (option) {
      case 'a': authority = optarg; break;
      case 'p': path = optarg; break;
      case 'b': file = optarg; break;
      case 'n': in_flight = atoi(optarg); break;
      case 'c': connections = atoi(optarg); break;
      case 'w': warmup = atof(optarg); break;
      case 's': seconds = atof(optarg); break;
      case 'y': cycle = true; break;
      case 'i':
        if (pid_count == MAX_PIDS) die("too many --pid");
        pids[pid_count++] = atoi(optarg);
        break;
      case '1': http1 = true; break;
      case 't': patient = true; break;
      case 'r': rate = atof(optarg); break;
      case 'h': {
        char *value = strchr(optarg, ':');
        if (value == NULL) die("--header takes name:value");
        *value++ = 0;
        if (extra_count == MAX_HEADERS / 2) die("too many --header");
        extra[extra_count][0] = optarg;
        extra[extra_count++][1] = value;
        break;
      }
      default: return 2;
    }
  if (authority == NULL || file == NULL || (path == NULL && !http1) || in_flight < 1 || connections < 1) die("an option is missing");
  if (http1 || connections > in_flight) connections = in_flight;
  if (!http1) add_common_headers();
  for (int n = 0; n < extra_count; n++) add_header(extra[n][0], extra[n][1]);
  load_bodies(file);

  char host[64];
  const char *colon = strrchr(authority, ':');
  struct sockaddr_in address = {.sin_family = AF_INET};
  if (colon == NULL || (size_t)(colon - authority) >= sizeof host) die("%s is not host:port", authority);
  snprintf(host, sizeof host, "%.*s", (int)(colon - authority), authority);
  address.sin_port = htons((uint16_t)atoi(colon + 1));
  if (inet_pton(AF_INET, host, &address.sin_addr) != 1) die("%s is no IPv4 address", host);

  epoll_fd = epoll_create1(0);
  connection *all = calloc((size_t)connections, sizeof *all);
  if (all == NULL) die("out of memory");
  for (int n = 0; n < connections; n++) connect_to(&all[n], &address);

  enum { WARMING, MEASURING, DRAINING } phase = WARMING;
  uint64_t started = now_ns();
  window_start = started + (uint64_t)(warmup * 1e9);
  window_end = UINT64_MAX;
  const bool closed_loop = rate <= 0;
  for (int n = 0; n < connections; n++) fill(&all[n], closed_loop ? share(n, in_flight, connections) : 0);
  uint64_t opened = 0, closed = 0;
  while (phase != DRAINING || outstanding > 0) {
    struct epoll_event events[64];
    int ready = epoll_wait(epoll_fd, events, 64, closed_loop ? 2 : 1);
    for (int n = 0; n < ready; n++) {
      connection *which = events[n].data.ptr;
      if (events[n].events & (EPOLLIN | EPOLLERR | EPOLLHUP)) receive(which);
      fill(which, closed_loop ? share((int)(which - all), in_flight, connections) : 0);
    }
    uint64_t now = now_ns();
    while (resting_count && resting[0].until <= now) {
      connection *which = end_rest();
      fill(which, share((int)(which - all), in_flight, connections));
    }
    /* What is due by now, in turn on all connections; beyond the most that may be open it is not sent at all. */
    for (; !closed_loop && !stopping && due < (uint64_t)((double)(now - started) / 1e9 * rate); due++) {
      connection *which = &all[due % (uint64_t)connections];
      if (outstanding < (size_t)in_flight) fill(which, which->in_flight + 1);
    }
    if (phase == WARMING && now >= window_start) {
      phase = MEASURING;
      opened = now;
      window_end = now + (uint64_t)(seconds * 1e9);
      own = own_seconds();
      for (int n = 0; n < pid_count; n++) pid_seconds[n] = process_seconds(pids[n]);
    } else if (phase == MEASURING && now >= window_end) {
      phase = DRAINING;
      stopping = true;
      closed = window_end;
      own = own_seconds() - own;
      for (int n = 0; n < pid_count; n++) pid_seconds[n] = process_seconds(pids[n]) - pid_seconds[n];
    } else if (phase == DRAINING && now > closed + DRAIN_SECONDS * 1000000000ull) {
      die("%zu calls were never answered", outstanding);
    }
  }

  qsort(latencies, replies_in_window, sizeof *latencies, by_value);
  printf("{\"refused\": %llu, ", (unsigned long long)refused_in_window);
  printf("\"replies\": %llu, \"seconds\": %.6f, \"bytes\": %llu, \"sent\": %llu, \"load_generator_cpu_s\": %.4f", (unsigned long long)replies_in_window,
         (double)(closed - opened) / 1e9, (unsigned long long)bytes_in_window, (unsigned long long)sent_total, own);
  printf(", \"p50\": %u, \"p90\": %u, \"p99\": %u, \"max\": %u, \"cpu\": [", quantile(0.5), quantile(0.9), quantile(0.99), quantile(1));
  for (int n = 0; n < pid_count; n++) printf("%s%.4f", n ? ", " : "", pid_seconds[n]);
  printf("], \"statuses\": {");
  const char *comma = "";
  for (int n = 0; n < STATUSES; n++)
    if (statuses[n]) {
      printf("%s\"%d\": %llu", comma, n == NO_STATUS ? -1 : n, (unsigned long long)statuses[n]);
      comma = ", ";
    }
  printf("}}\n");
  return 0;
}
