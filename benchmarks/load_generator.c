/* A load generator for unary gRPC methods and for HTTP/1.1.
 *
 * By default it runs a closed loop: --in-flight callers, each of which sends its next request when
 * it has the reply. With --rate it runs an open loop: it sends that many requests per second,
 * whatever the server answers, and --in-flight is the maximum of unanswered requests. The status of
 * every reply is checked. Requests beyond the server's SETTINGS_MAX_CONCURRENT_STREAMS wait in this
 * process. With --honor-retry-info a refused caller waits for the time in the reply's RetryInfo.
 *
 *   load_generator --address 127.0.0.1:50051 --bodies FILE --in-flight 64
 *                  --path /chathistory.v1.ChatHistoryService/AppendMessages
 *                  [--connections 8] [--warmup 0.5] [--seconds 3] [--cycle]
 *                  [--header name:value]... [--pid PID]... [--http1]
 *                  [--honor-retry-info] [--rate 1000]
 *
 * FILE contains records: a 32-bit little-endian length, then that many bytes. With gRPC a record is
 * one request message. With --http1 it is one whole HTTP/1.1 request, and every connection carries
 * one request at a time. Each record is sent once, unless --cycle is given.
 *
 * Prints one JSON object. The window is the time between the warm-up and the end. The object
 * contains, for the window: the OK replies, their latencies and size, the number of other replies,
 * the length of the window, and the CPU time of this process and of each --pid. It also contains
 * the statuses of all replies, inside and outside the window.
 *
 * libnghttp2 implements HTTP/2. There is one thread with one epoll loop.
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

enum {
  STATUS_COUNT = 600,
  NO_STATUS = STATUS_COUNT - 1,
  MAX_PIDS = 8,
  MAX_HEADERS = 16,
  WINDOW_BYTES = 1 << 24,
  PREFIX_BYTES = 5,
  BUFFER_BYTES = 1 << 18,
  MAX_SHOWN = 3
};
enum { DRAIN_TIMEOUT_S = 30 };

typedef struct connection connection;

typedef struct stream {
  connection *owner;
  const uint8_t *body;
  uint32_t length, sent;
  uint64_t started_ns;
  int status, http_status;
  uint64_t reply_bytes, retry_after_ns;
  struct stream *next;
} stream;

/* A refused caller that waits before its next request. */
typedef struct backoff {
  uint64_t until_ns;
  connection *owner;
} backoff;

struct connection {
  int fd;
  nghttp2_session *session;
  bool is_output_blocked;
  uint8_t *output; /* Bytes that the socket has not accepted yet. */
  size_t output_length, output_offset, output_capacity;
  int in_flight, backing_off;
  stream *free_streams; /* Free list of ended streams. */
  /* HTTP/1.1: the current reply. */
  uint8_t *input;
  size_t input_length, input_capacity;
  stream *current_stream;
};

static const char *path, *authority;
static nghttp2_nv headers[MAX_HEADERS];
static size_t header_count;
static uint8_t *bodies;
static size_t bodies_length, body_offset;
static bool repeats_bodies, is_http1, is_stopping, honors_retry_info;
static backoff *backoffs; /* A heap with the earliest end on top. */
static size_t backoff_count, backoff_capacity;
static uint64_t due_count, window_start_ns, window_end_ns, replies_in_window, refused_in_window,
    bytes_in_window, sent_count, statuses[STATUS_COUNT];
static uint32_t *latencies;
static size_t latency_capacity, outstanding;
static int epoll_fd, shown_count;

static void die(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fprintf(stderr, "load generator: ");
  vfprintf(stderr, format, arguments);
  fprintf(stderr, "\n");
  va_end(arguments);
  exit(1);
}

static void *grow(void *memory, size_t bytes) {
  void *resized = realloc(memory, bytes);
  if (resized == NULL) die("out of memory");
  return resized;
}

static uint64_t now_ns(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static double process_cpu_seconds(int pid) {
  char name[64], text[1024];
  snprintf(name, sizeof name, "/proc/%d/stat", pid);
  int fd = open(name, O_RDONLY);
  if (fd < 0) die("process %d does not exist", pid);
  ssize_t length = read(fd, text, sizeof text - 1);
  close(fd);
  text[length > 0 ? length : 0] = 0;
  const char *rest = strrchr(text, ')'); /* The name may contain any character. */
  unsigned long user, system;
  if (rest == NULL ||
      sscanf(rest + 2, "%*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &system) != 2)
    die("cannot read %s", name);
  return (double)(user + system) / (double)sysconf(_SC_CLK_TCK);
}

static double own_cpu_seconds(void) {
  struct rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
         (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

static void take_body(stream *request) {
  if (body_offset >= bodies_length) {
    if (!repeats_bodies)
      die("all %llu request bodies have been sent; provide more or use --cycle",
          (unsigned long long)sent_count);
    body_offset = 0;
  }
  uint32_t length;
  memcpy(&length, bodies + body_offset, 4);
  request->body = bodies + body_offset + 4;
  request->length = length;
  body_offset += 4 + (size_t)length;
}

static stream *new_stream(connection *owner) {
  stream *request = owner->free_streams;
  if (request != NULL)
    owner->free_streams = request->next;
  else
    request = grow(NULL, sizeof *request);
  memset(request, 0, sizeof *request);
  request->owner = owner;
  request->status = NO_STATUS;
  take_body(request);
  request->started_ns = now_ns();
  owner->in_flight++;
  outstanding++;
  sent_count++;
  return request;
}

static void begin_backoff(connection *owner, uint64_t until_ns) {
  if (backoff_count == backoff_capacity) {
    backoff_capacity = backoff_capacity ? backoff_capacity * 2 : 1 << 12;
    backoffs = grow(backoffs, backoff_capacity * sizeof *backoffs);
  }
  size_t at = backoff_count++;
  for (size_t parent; at > 0 && backoffs[parent = (at - 1) / 2].until_ns > until_ns; at = parent)
    backoffs[at] = backoffs[parent];
  backoffs[at] = (backoff){until_ns, owner};
  owner->backing_off++;
}

static connection *end_backoff(void) {
  connection *owner = backoffs[0].owner;
  backoff last = backoffs[--backoff_count];
  size_t at = 0;
  for (size_t child; (child = 2 * at + 1) < backoff_count; at = child) {
    if (child + 1 < backoff_count && backoffs[child + 1].until_ns < backoffs[child].until_ns)
      child++;
    if (backoffs[child].until_ns >= last.until_ns) break;
    backoffs[at] = backoffs[child];
  }
  backoffs[at] = last;
  owner->backing_off--;
  return owner;
}

static bool is_ok(const stream *reply) { return reply->status == (is_http1 ? 200 : 0); }

static void end_stream(stream *reply) {
  connection *owner = reply->owner;
  uint64_t now = now_ns();
  statuses[reply->status]++;
  if (honors_retry_info && reply->retry_after_ns && !is_stopping)
    begin_backoff(owner, now + reply->retry_after_ns);
  if (now >= window_start_ns && now < window_end_ns && !is_ok(reply)) refused_in_window++;
  if (now >= window_start_ns && now < window_end_ns && is_ok(reply)) {
    if (replies_in_window == latency_capacity) {
      latency_capacity = latency_capacity ? latency_capacity * 2 : 1 << 16;
      latencies = grow(latencies, latency_capacity * sizeof *latencies);
    }
    uint64_t microseconds = (now - reply->started_ns) / 1000;
    latencies[replies_in_window++] =
        microseconds > UINT32_MAX ? UINT32_MAX : (uint32_t)microseconds;
    bytes_in_window += reply->reply_bytes;
  }
  owner->in_flight--;
  outstanding--;
  reply->next = owner->free_streams;
  owner->free_streams = reply;
}

/* -- Output queue of both protocols -- */

static void queue(connection *target, const uint8_t *data, size_t length) {
  if (target->output_length + length > target->output_capacity) {
    target->output_capacity = (target->output_length + length) * 2;
    target->output = grow(target->output, target->output_capacity);
  }
  memcpy(target->output + target->output_length, data, length);
  target->output_length += length;
}

static void flush(connection *target) {
  while (target->output_offset < target->output_length) {
    ssize_t written = write(target->fd, target->output + target->output_offset,
                            target->output_length - target->output_offset);
    if (written < 0) {
      if (errno == EAGAIN) break;
      die("the server closed a connection: %s", strerror(errno));
    }
    target->output_offset += (size_t)written;
  }
  bool has_more = target->output_offset < target->output_length;
  if (!has_more) target->output_offset = target->output_length = 0;
  if (has_more != target->is_output_blocked) {
    target->is_output_blocked = has_more;
    struct epoll_event event = {.events = EPOLLIN | (has_more ? EPOLLOUT : 0), .data.ptr = target};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, target->fd, &event);
  }
}

/* -- gRPC -- */

static ssize_t read_body(nghttp2_session *session, int32_t id, uint8_t *buffer, size_t capacity,
                         uint32_t *flags, nghttp2_data_source *source, void *user) {
  (void)session, (void)id, (void)user;
  stream *request = source->ptr;
  const uint32_t total = request->length + PREFIX_BYTES;
  const uint8_t prefix[PREFIX_BYTES] = {0, (uint8_t)(request->length >> 24),
                                        (uint8_t)(request->length >> 16),
                                        (uint8_t)(request->length >> 8),
                                        (uint8_t)request->length};
  size_t copied = 0;
  while (copied < capacity && request->sent < total) {
    if (request->sent < PREFIX_BYTES) {
      buffer[copied++] = prefix[request->sent++];
      continue;
    }
    size_t remaining = total - request->sent,
           count = remaining < capacity - copied ? remaining : capacity - copied;
    memcpy(buffer + copied, request->body + (request->sent - PREFIX_BYTES), count);
    copied += count;
    request->sent += (uint32_t)count;
  }
  if (request->sent == total) *flags |= NGHTTP2_DATA_FLAG_EOF;
  return (ssize_t)copied;
}

static void add_header(const char *name, const char *value) {
  if (header_count == MAX_HEADERS) die("too many --header options");
  headers[header_count++] =
      (nghttp2_nv){(uint8_t *)name, (uint8_t *)value, strlen(name), strlen(value),
                   NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE};
}

/* Headers of every call. A deadline is one of them, as clients should set one. */
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

static void send_grpc_request(connection *target) {
  stream *request = new_stream(target);
  nghttp2_data_provider body = {.source.ptr = request, .read_callback = read_body};
  int32_t id = nghttp2_submit_request(target->session, NULL, headers, header_count, &body, request);
  if (id < 0) die("cannot send a request: %s", nghttp2_strerror(id));
}

static const uint8_t *find(const uint8_t *data, size_t length, const char *text) {
  return memmem(data, length, text, strlen(text));
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

/* Returns the delay in nanoseconds of the RetryInfo in a base64-encoded google.rpc.Status, or 0. */
static uint64_t read_retry_after_ns(const uint8_t *text, size_t length) {
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
  /* The value of the Any contains the delay, which contains seconds and nanoseconds. */
  if (end - at < 4 || at[0] != 0x12 || at[2] != 0x0a) return 0;
  at += 4;
  uint64_t delay_ns = 0;
  while (at < end) {
    uint8_t key = *at++;
    if (key != 0x08 && key != 0x10) break;
    delay_ns += read_varint(&at, end) * (key == 0x08 ? 1000000000u : 1u);
  }
  return delay_ns;
}

static int on_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name,
                     size_t name_length, const uint8_t *value, size_t length, uint8_t flags,
                     void *user) {
  (void)flags, (void)user;
  stream *reply = nghttp2_session_get_stream_user_data(session, frame->hd.stream_id);
  if (reply == NULL) return 0;
  if (name_length == 11 && memcmp(name, "grpc-status", 11) == 0) {
    int status = atoi((const char *)value);
    reply->status = status >= 0 && status < NO_STATUS ? status : NO_STATUS;
  } else if (name_length == 7 && memcmp(name, ":status", 7) == 0) {
    reply->http_status = atoi((const char *)value);
  } else if (honors_retry_info && name_length == 23 &&
             memcmp(name, "grpc-status-details-bin", 23) == 0) {
    reply->retry_after_ns = read_retry_after_ns(value, length);
  } else if (name_length == 12 && memcmp(name, "grpc-message", 12) == 0 && length &&
             shown_count < MAX_SHOWN) {
    shown_count++;
    fprintf(stderr, "load generator: reply: %.*s\n", (int)length, (const char *)value);
  }
  return 0;
}

static int on_data(nghttp2_session *session, uint8_t flags, int32_t id, const uint8_t *data,
                   size_t length, void *user) {
  (void)flags, (void)data, (void)user;
  stream *reply = nghttp2_session_get_stream_user_data(session, id);
  if (reply != NULL) reply->reply_bytes += length;
  return 0;
}

static int on_close(nghttp2_session *session, int32_t id, uint32_t error, void *user) {
  (void)user;
  stream *reply = nghttp2_session_get_stream_user_data(session, id);
  if (reply == NULL) return 0;
  /* A unary call that ends with OK has a message. */
  if (error != NGHTTP2_NO_ERROR || reply->http_status != 200 ||
      (reply->status == 0 && reply->reply_bytes < PREFIX_BYTES))
    reply->status = NO_STATUS;
  end_stream(reply);
  return 0;
}

/* Latency counts from the moment a request is sent. A request that the server's limit of streams
 * per connection delays waits in this process, as in any client. */
static int on_sent(nghttp2_session *session, const nghttp2_frame *frame, void *user) {
  (void)user;
  stream *request = frame->hd.type == NGHTTP2_HEADERS
                        ? nghttp2_session_get_stream_user_data(session, frame->hd.stream_id)
                        : NULL;
  if (request != NULL) request->started_ns = now_ns();
  return 0;
}

static void open_session(connection *target) {
  nghttp2_session_callbacks *callbacks;
  nghttp2_session_callbacks_new(&callbacks);
  nghttp2_session_callbacks_set_on_frame_send_callback(callbacks, on_sent);
  nghttp2_session_callbacks_set_on_header_callback(callbacks, on_header);
  nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, on_data);
  nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, on_close);
  if (nghttp2_session_client_new(&target->session, callbacks, target) != 0) die("out of memory");
  nghttp2_session_callbacks_del(callbacks);
  const nghttp2_settings_entry settings[] = {{NGHTTP2_SETTINGS_ENABLE_PUSH, 0},
                                             {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, WINDOW_BYTES}};
  nghttp2_submit_settings(target->session, NGHTTP2_FLAG_NONE, settings, 2);
  nghttp2_session_set_local_window_size(target->session, NGHTTP2_FLAG_NONE, 0, WINDOW_BYTES);
}

static void send_frames(connection *target) {
  const uint8_t *data;
  ssize_t length;
  while ((length = nghttp2_session_mem_send(target->session, &data)) > 0)
    queue(target, data, (size_t)length);
  if (length < 0) die("HTTP/2: %s", nghttp2_strerror((int)length));
}

/* -- HTTP/1.1 -- */

static void send_http1_request(connection *target) {
  target->current_stream = new_stream(target);
  queue(target, target->current_stream->body, target->current_stream->length);
}

static void read_reply(connection *source, const uint8_t *data, size_t length) {
  if (source->input_length + length + 1 > source->input_capacity) {
    source->input_capacity = (source->input_length + length + 1) * 2;
    source->input = grow(source->input, source->input_capacity);
  }
  memcpy(source->input + source->input_length, data, length);
  source->input_length += length;
  source->input[source->input_length] = 0;
  const char *text = (const char *)source->input, *end = strstr(text, "\r\n\r\n"),
             *content_length = strcasestr(text, "\r\ncontent-length:");
  if (end == NULL) return;
  if (content_length == NULL || content_length > end) die("a reply has no content-length header");
  size_t head_length = (size_t)(end + 4 - text),
         total = head_length + (size_t)atol(content_length + 17);
  if (source->input_length < total) return;
  if (source->input_length > total || source->current_stream == NULL)
    die("a reply is longer than its content-length");
  int status = atoi(text + 9);
  source->current_stream->status = status > 0 && status < NO_STATUS ? status : NO_STATUS;
  source->current_stream->reply_bytes = total - head_length;
  if (status >= 400 && shown_count++ < MAX_SHOWN)
    fprintf(stderr, "load generator: reply: %s\n", end + 4);
  source->input_length = 0;
  end_stream(source->current_stream);
  source->current_stream = NULL;
}

/* -- The event loop -- */

static void fill(connection *target, int max_in_flight) {
  while (!is_stopping && target->in_flight + target->backing_off < max_in_flight) {
    if (is_http1)
      send_http1_request(target);
    else
      send_grpc_request(target);
  }
  if (!is_http1) send_frames(target);
  flush(target);
}

static void receive(connection *source) {
  static uint8_t buffer[BUFFER_BYTES];
  ssize_t length = read(source->fd, buffer, sizeof buffer);
  if (length < 0 && errno == EAGAIN) return;
  if (length <= 0) die("the server closed a connection");
  if (is_http1) {
    read_reply(source, buffer, (size_t)length);
    return;
  }
  ssize_t consumed = nghttp2_session_mem_recv(source->session, buffer, (size_t)length);
  if (consumed < 0) die("HTTP/2: %s", nghttp2_strerror((int)consumed));
  if (!nghttp2_session_want_read(source->session)) die("the server ended a connection");
}

static void connect_to(connection *target, const struct sockaddr_in *address) {
  target->fd = socket(AF_INET, SOCK_STREAM, 0);
  if (target->fd < 0 || connect(target->fd, (const struct sockaddr *)address, sizeof *address) != 0)
    die("cannot connect: %s", strerror(errno));
  int on = 1;
  setsockopt(target->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  fcntl(target->fd, F_SETFL, O_NONBLOCK);
  if (!is_http1) open_session(target);
  struct epoll_event event = {.events = EPOLLIN, .data.ptr = target};
  epoll_ctl(epoll_fd, EPOLL_CTL_ADD, target->fd, &event);
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

static struct {
  const char *bodies;
  int in_flight, connections;
  double warmup, seconds, rate;
  const char *headers[MAX_HEADERS / 2][2];
  int header_count;
  int pids[MAX_PIDS], pid_count;
} options = {.in_flight = 1, .connections = 1, .warmup = 0.5, .seconds = 3};

static void add_header_option(char *option) {
  char *value = strchr(option, ':');
  if (value == NULL) die("--header takes name:value");
  *value++ = 0;
  if (options.header_count == MAX_HEADERS / 2) die("too many --header options");
  options.headers[options.header_count][0] = option;
  options.headers[options.header_count++][1] = value;
}

static void parse_options(int count, char **arguments) {
  static const struct option names[] = {
      {"address", 1, 0, 'a'},     {"path", 1, 0, 'p'},
      {"bodies", 1, 0, 'b'},      {"in-flight", 1, 0, 'n'},
      {"connections", 1, 0, 'c'}, {"warmup", 1, 0, 'w'},
      {"seconds", 1, 0, 's'},     {"cycle", 0, 0, 'y'},
      {"pid", 1, 0, 'i'},         {"http1", 0, 0, '1'},
      {"header", 1, 0, 'h'},      {"honor-retry-info", 0, 0, 't'},
      {"rate", 1, 0, 'r'},        {0, 0, 0, 0},
  };
  int option;
  while ((option = getopt_long(count, arguments, "", names, NULL)) != -1) switch (option) {
      case 'a': authority = optarg; break;
      case 'p': path = optarg; break;
      case 'b': options.bodies = optarg; break;
      case 'n': options.in_flight = atoi(optarg); break;
      case 'c': options.connections = atoi(optarg); break;
      case 'w': options.warmup = atof(optarg); break;
      case 's': options.seconds = atof(optarg); break;
      case 'y': repeats_bodies = true; break;
      case 'i':
        if (options.pid_count == MAX_PIDS) die("too many --pid options");
        options.pids[options.pid_count++] = atoi(optarg);
        break;
      case '1': is_http1 = true; break;
      case 't': honors_retry_info = true; break;
      case 'r': options.rate = atof(optarg); break;
      case 'h': add_header_option(optarg); break;
      default: exit(2);
    }
  if (authority == NULL || options.bodies == NULL || (path == NULL && !is_http1))
    die("--address, --bodies and --path (or --http1) are required");
  if (options.in_flight < 1 || options.connections < 1)
    die("--in-flight and --connections start at 1");
  if (is_http1 || options.connections > options.in_flight) options.connections = options.in_flight;
}

static struct sockaddr_in parse_address(void) {
  char host[64];
  const char *colon = strrchr(authority, ':');
  struct sockaddr_in address = {.sin_family = AF_INET};
  if (colon == NULL || (size_t)(colon - authority) >= sizeof host)
    die("--address: %s is not host:port", authority);
  snprintf(host, sizeof host, "%.*s", (int)(colon - authority), authority);
  address.sin_port = htons((uint16_t)atoi(colon + 1));
  if (inet_pton(AF_INET, host, &address.sin_addr) != 1) die("%s is not an IPv4 address", host);
  return address;
}

static connection *open_connections(void) {
  const struct sockaddr_in address = parse_address();
  epoll_fd = epoll_create1(0);
  connection *connections = calloc((size_t)options.connections, sizeof *connections);
  if (connections == NULL) die("out of memory");
  for (int n = 0; n < options.connections; n++) connect_to(&connections[n], &address);
  return connections;
}

/* The number of callers of a connection in a closed loop. */
static int caller_count(int index) {
  return options.in_flight / options.connections +
         (index < options.in_flight % options.connections);
}

static void handle_events(connection *connections, bool closed_loop) {
  struct epoll_event events[64];
  int ready = epoll_wait(epoll_fd, events, 64, closed_loop ? 2 : 1);
  for (int n = 0; n < ready; n++) {
    connection *target = events[n].data.ptr;
    if (events[n].events & (EPOLLIN | EPOLLERR | EPOLLHUP)) receive(target);
    fill(target, closed_loop ? caller_count((int)(target - connections)) : 0);
  }
}

static void end_due_backoffs(connection *connections, uint64_t now) {
  while (backoff_count && backoffs[0].until_ns <= now) {
    connection *target = end_backoff();
    fill(target, caller_count((int)(target - connections)));
  }
}

/* Open loop: sends the requests that are due, on all connections in turn. Those beyond the maximum
 * of unanswered requests are dropped. */
static void send_due_requests(connection *connections, double elapsed_s) {
  for (; !is_stopping && due_count < (uint64_t)(elapsed_s * options.rate); due_count++) {
    connection *target = &connections[due_count % (uint64_t)options.connections];
    if (outstanding < (size_t)options.in_flight) fill(target, target->in_flight + 1);
  }
}

/* CPU seconds of this process and of each --pid between the two calls of measure_cpu. */
static double own_cpu_s, cpu_s[MAX_PIDS];

static void measure_cpu(void) {
  own_cpu_s = own_cpu_seconds() - own_cpu_s;
  for (int n = 0; n < options.pid_count; n++)
    cpu_s[n] = process_cpu_seconds(options.pids[n]) - cpu_s[n];
}

/* Returns the length of the window in seconds. */
static double run(connection *connections) {
  enum { WARMING, MEASURING, DRAINING } phase = WARMING;
  const bool closed_loop = options.rate <= 0;
  const uint64_t started_ns = now_ns();
  window_start_ns = started_ns + (uint64_t)(options.warmup * 1e9);
  window_end_ns = UINT64_MAX;
  uint64_t opened_ns = 0;
  for (int n = 0; n < options.connections; n++)
    fill(&connections[n], closed_loop ? caller_count(n) : 0);
  while (phase != DRAINING || outstanding > 0) {
    handle_events(connections, closed_loop);
    uint64_t now = now_ns();
    end_due_backoffs(connections, now);
    if (!closed_loop) send_due_requests(connections, (double)(now - started_ns) / 1e9);
    if (phase == WARMING && now >= window_start_ns) {
      phase = MEASURING;
      opened_ns = now;
      window_end_ns = now + (uint64_t)(options.seconds * 1e9);
      measure_cpu();
    } else if (phase == MEASURING && now >= window_end_ns) {
      phase = DRAINING;
      is_stopping = true;
      measure_cpu();
    } else if (phase == DRAINING && now > window_end_ns + DRAIN_TIMEOUT_S * 1000000000ull) {
      die("%zu calls were not answered within %d seconds after the end", outstanding,
          DRAIN_TIMEOUT_S);
    }
  }
  return (double)(window_end_ns - opened_ns) / 1e9;
}

static void print_results(double seconds) {
  qsort(latencies, replies_in_window, sizeof *latencies, by_value);
  printf("{\"refused\": %llu, ", (unsigned long long)refused_in_window);
  printf("\"replies\": %llu, \"seconds\": %.6f, ", (unsigned long long)replies_in_window, seconds);
  printf("\"bytes\": %llu, ", (unsigned long long)bytes_in_window);
  printf("\"sent\": %llu, ", (unsigned long long)sent_count);
  printf("\"load_generator_cpu_s\": %.4f, ", own_cpu_s);
  printf("\"p50\": %u, \"p90\": %u, ", quantile(0.5), quantile(0.9));
  printf("\"p99\": %u, \"max\": %u, \"cpu\": [", quantile(0.99), quantile(1));
  for (int n = 0; n < options.pid_count; n++) printf("%s%.4f", n ? ", " : "", cpu_s[n]);
  printf("], \"statuses\": {");
  const char *comma = "";
  for (int n = 0; n < STATUS_COUNT; n++)
    if (statuses[n]) {
      printf("%s\"%d\": %llu", comma, n == NO_STATUS ? -1 : n, (unsigned long long)statuses[n]);
      comma = ", ";
    }
  printf("}}\n");
}

int main(int count, char **arguments) {
  parse_options(count, arguments);
  if (!is_http1) add_common_headers();
  for (int n = 0; n < options.header_count; n++)
    add_header(options.headers[n][0], options.headers[n][1]);
  load_bodies(options.bodies);
  print_results(run(open_connections()));
  return 0;
}
