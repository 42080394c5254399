/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Stands in for a guest and its driver, so that the examples need no virtual machine: memory, and
 * the driver's side of split virtqueues in it (VIRTIO 1.4, 2.7). A VMM has none of this; its guest
 * does.
 *
 * Like Linux' driver it has one buffer outstanding at a time, and waits for each.
 */
#ifndef AEROSTAT_EXAMPLES_GUEST_H
#define AEROSTAT_EXAMPLES_GUEST_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <endian.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"

#define PAGE_BYTES 4096u

/* The guest's memory starts at guest address 0. */
struct guest {
    unsigned char *ram;
    size_t ram_bytes;
    /* Guest address of the first byte that is not in use. */
    uint64_t unused;
};

struct ring_desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags;
    uint16_t next;
};

struct ring_used_elem {
    uint32_t id;
    uint32_t len;
};

/* The driver's side of a virtqueue. */
struct ring {
    uint16_t size;
    uint16_t used_seen;
    uint64_t desc_gpa, avail_gpa, used_gpa;
    struct ring_desc *desc;
    uint16_t *avail; /* flags, idx, ring[size] */
    uint16_t *used;  /* flags, idx, then struct ring_used_elem[size] */
    int kick_fd, call_fd;
};

#define RING_DESC_WRITE 2

static inline int new_eventfd(void)
{
    int fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    CHECK(fd >= 0);
    return fd;
}

/* Waits up to ten seconds for an eventfd; returns whether it was signalled, and clears it. */
static inline int wait_eventfd(int fd)
{
    struct pollfd poll_fd;
    uint64_t count;
    poll_fd.fd = fd;
    poll_fd.events = POLLIN;
    poll_fd.revents = 0;
    return poll(&poll_fd, 1, 10000) == 1 && read(fd, &count, sizeof(count)) == sizeof(count);
}

/* Takes memory from the guest's start, for rings and buffers. */
static inline uint64_t guest_alloc(struct guest *guest, size_t bytes, size_t align)
{
    uint64_t gpa = (guest->unused + align - 1) / align * align;
    CHECK(gpa + bytes <= guest->ram_bytes);
    guest->unused = gpa + bytes;
    memset(guest->ram + gpa, 0, bytes);
    return gpa;
}

static inline void ring_new(struct ring *ring, struct guest *guest, uint16_t size)
{
    ring->size = size;
    ring->used_seen = 0;
    ring->desc_gpa = guest_alloc(guest, sizeof(struct ring_desc) * size, 16);
    ring->avail_gpa = guest_alloc(guest, sizeof(uint16_t) * (3u + size), 2);
    ring->used_gpa = guest_alloc(guest, 6 + sizeof(struct ring_used_elem) * size, 4);
    ring->desc = (struct ring_desc *)(void *)(guest->ram + ring->desc_gpa);
    ring->avail = (uint16_t *)(void *)(guest->ram + ring->avail_gpa);
    ring->used = (uint16_t *)(void *)(guest->ram + ring->used_gpa);
    ring->kick_fd = new_eventfd();
    ring->call_fd = new_eventfd();
}

static inline void ring_close(struct ring *ring)
{
    close(ring->kick_fd);
    close(ring->call_fd);
}

/* Makes one buffer available and kicks. */
static inline void ring_add(struct ring *ring, uint64_t gpa, uint32_t len, int writable)
{
    uint16_t index = le16toh(ring->avail[1]);
    uint64_t one = 1;
    ring->desc[0].addr = htole64(gpa);
    ring->desc[0].len = htole32(len);
    ring->desc[0].flags = htole16(writable ? RING_DESC_WRITE : 0);
    ring->desc[0].next = 0;
    ring->avail[2 + index % ring->size] = 0;
    __atomic_store_n(&ring->avail[1], htole16((uint16_t)(index + 1)), __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    CHECK(write(ring->kick_fd, &one, sizeof(one)) == sizeof(one));
}

static inline uint16_t ring_used_index(const struct ring *ring)
{
    return le16toh(__atomic_load_n(&ring->used[1], __ATOMIC_ACQUIRE));
}

/* Waits for the interrupt that says that the buffer was used. */
static inline void ring_wait(struct ring *ring)
{
    while (ring_used_index(ring) == ring->used_seen) {
        CHECK(wait_eventfd(ring->call_fd));
    }
    ring->used_seen++;
}

/* What page frame numbers look like in a buffer. */
static inline void put_pfn(unsigned char *buffer, size_t index, uint32_t pfn)
{
    uint32_t le = htole32(pfn);
    memcpy(buffer + index * sizeof(le), &le, sizeof(le));
}

/* Whether the host has memory behind a page. */
static inline int page_is_resident(const struct guest *guest, uint32_t pfn)
{
    unsigned char resident = 0;
    CHECK(mincore(guest->ram + (size_t)pfn * PAGE_BYTES, PAGE_BYTES, &resident) == 0);
    return resident & 1;
}

#endif
