/* CRC-32 and SHA-256, without the server: tested natively by test.c. */
#ifndef DIGEST_H
#define DIGEST_H

#include <stddef.h>
#include <stdint.h>

/* CRC-32 of ISO 3309, as zip and PNG have it. */
uint32_t crc32_of(const uint8_t *bytes, size_t length);

/* SHA-256 of FIPS 180-4. */
void sha256_of(const uint8_t *bytes, size_t length, uint8_t digest[32]);

#endif
