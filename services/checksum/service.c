/* CRC-32 and SHA-256 of a binary payload. Remembers the sums that it has seen
 * where its configuration says `remember` = "true". */
#include "digest.h"
#include "gen/app.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char DESCRIPTION[] =
    "{\"name\":\"checksum\",\"version\":\"1.0.0\",\"description\":\"CRC-32 and SHA-256 of bytes\",\"actions\":["
    "{\"name\":\"of\",\"description\":\"Sums up a binary payload; seen tells whether it came before.\","
    "\"output\":{\"type\":\"object\",\"required\":[\"bytes\",\"crc32\",\"sha256\",\"seen\"],\"properties\":{"
    "\"bytes\":{\"type\":\"integer\"},\"crc32\":{\"type\":\"string\"},\"sha256\":{\"type\":\"string\"},"
    "\"seen\":{\"type\":\"boolean\"}}}}]}";

/* wasi-libc brings these in for output that nobody makes. */
int32_t __imported_wasi_snapshot_preview1_fd_close(int32_t a) { (void)a; return 8; }
int32_t __imported_wasi_snapshot_preview1_fd_seek(int32_t a, int64_t b, int32_t c, int32_t d) {
    (void)a, (void)b, (void)c, (void)d;
    return 8;
}
int32_t __imported_wasi_snapshot_preview1_fd_write(int32_t a, int32_t b, int32_t c, int32_t d) {
    (void)a, (void)b, (void)c, (void)d;
    return 8;
}

static app_string_t text(const char *value) {
    return (app_string_t){(uint8_t *)value, strlen(value)};
}

static bool refuse(mb_service_types_failure_t *failure, const char *code, const char *message) {
    app_string_dup(&failure->code, code);
    app_string_dup(&failure->message, message);
    failure->details.is_some = false;
    return false;
}

static bool remembers(void) {
    app_string_t key = text("remember");
    app_option_string_t value;
    wasi_config_store_error_t error;
    if (!wasi_config_store_get(&key, &value, &error)) {
        wasi_config_store_error_free(&error);
        return false;
    }
    bool yes = value.is_some && value.val.len == 4 && memcmp(value.val.ptr, "true", 4) == 0;
    app_option_string_free(&value);
    return yes;
}

/* Whether the sum was there before; it is there from now on. */
static bool seen_before(const char *sum, bool *seen) {
    app_string_t name = text("seen"), key = text(sum);
    app_list_u8_t nothing = {NULL, 0};
    wasi_keyvalue_store_own_bucket_t bucket;
    wasi_keyvalue_store_error_t error;
    if (!wasi_keyvalue_store_open(&name, &bucket, &error)) {
        wasi_keyvalue_store_error_free(&error);
        return false;
    }
    wasi_keyvalue_store_borrow_bucket_t borrowed = wasi_keyvalue_store_borrow_bucket(bucket);
    bool done = wasi_keyvalue_store_method_bucket_exists(borrowed, &key, seen, &error) &&
                (*seen || wasi_keyvalue_store_method_bucket_set(borrowed, &key, &nothing, &error));
    if (!done) wasi_keyvalue_store_error_free(&error);
    wasi_keyvalue_store_bucket_drop_own(bucket);
    return done;
}

void exports_mb_service_handler_describe(app_string_t *answer) {
    app_string_dup(answer, DESCRIPTION);
}

/* The server asks only for the one action above. */
bool exports_mb_service_handler_handle(app_string_t *action, mb_service_types_payload_t *payload,
                                       mb_service_types_payload_t *answer, mb_service_types_failure_t *failure) {
    (void)action;
    if (payload->tag != MB_SERVICE_TYPES_PAYLOAD_BINARY) {
        return refuse(failure, "NOT_BINARY", "send the bytes as a binary payload");
    }
    const app_list_u8_t *bytes = &payload->val.binary;
    uint8_t digest[32];
    char sum[65], line[200];
    sha256_of(bytes->ptr, bytes->len, digest);
    for (int i = 0; i < 32; i++) snprintf(sum + 2 * i, 3, "%02x", digest[i]);
    bool seen = false;
    if (remembers() && !seen_before(sum, &seen)) {
        return refuse(failure, "STORE_FAILED", "the sums that were seen can't be read or kept");
    }
    snprintf(line, sizeof line, "%zu bytes, %s", bytes->len, seen ? "seen before" : "new");
    app_string_t context = text(""), message = text(line);
    wasi_logging_logging_log(WASI_LOGGING_LOGGING_LEVEL_INFO, &context, &message);
    snprintf(line, sizeof line, "{\"bytes\":%zu,\"crc32\":\"%08x\",\"sha256\":\"%s\",\"seen\":%s}", bytes->len,
             (unsigned)crc32_of(bytes->ptr, bytes->len), sum, seen ? "true" : "false");
    answer->tag = MB_SERVICE_TYPES_PAYLOAD_JSON;
    app_string_dup(&answer->val.json, line);
    return true;
}
