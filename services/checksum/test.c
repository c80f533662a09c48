/* Natively: cc -o /tmp/test test.c digest.c && /tmp/test */
#include "digest.h"

#include <stdio.h>
#include <string.h>

static int check(const char *text, uint32_t crc, const char *sha) {
    uint8_t digest[32];
    char hex[65];
    sha256_of((const uint8_t *)text, strlen(text), digest);
    for (int i = 0; i < 32; i++) sprintf(hex + 2 * i, "%02x", digest[i]);
    uint32_t found = crc32_of((const uint8_t *)text, strlen(text));
    if (found == crc && strcmp(hex, sha) == 0) return 0;
    printf("%s: %08x %s\n", text, found, hex);
    return 1;
}

int main(void) {
    int wrong = check("", 0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    wrong += check("123456789", 0xCBF43926u, "15e2b0d3c33891ebb0f1ef609ec419420c20e320ce94c65fbc8c3312448eb225");
    wrong += check("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 0x171A3F5Fu,
                   "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    return wrong != 0;
}
