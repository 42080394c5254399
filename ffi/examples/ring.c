/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A VMM in small: it gives the library its guest's memory and the place of the guest's rings, and
 * the library serves them on its own threads.
 *
 *     cc ring.c -laerostat && ./a.out
 */
#include "guest.h"

#include <aerostat.h>
#include <errno.h>

#define RAM_BYTES ((size_t)32 << 20)
#define ARRAY_PFNS 256u
#define BALLOON_PFNS (2 * ARRAY_PFNS)
#define BALLOON_BYTES ((uint64_t)BALLOON_PFNS * PAGE_BYTES)

enum { INFLATE, DEFLATE, STATS, QUEUES };

/* Bytes that the host has given to the guest's memory, as the file system counts them. */
static uint64_t host_bytes(int memfd)
{
    struct stat status;
    CHECK(fstat(memfd, &status) == 0);
    return (uint64_t)status.st_blocks * 512;
}

/* The pages that the guest gives: half of them in one piece, half of them every second one. */
static uint32_t balloon_pfn(uint32_t index)
{
    return index < ARRAY_PFNS ? 2048 + index : 4096 + 2 * (index - ARRAY_PFNS);
}

/* Sends the pages to a queue, 256 at a time, highest first as Linux' allocator tends to do. */
static void send_pages(struct guest *guest, struct ring *ring, uint64_t buffer)
{
    for (uint32_t sent = 0; sent < BALLOON_PFNS; sent += ARRAY_PFNS) {
        for (uint32_t i = 0; i < ARRAY_PFNS; i++) {
            put_pfn(guest->ram + buffer, i, balloon_pfn(sent + ARRAY_PFNS - 1 - i));
        }
        ring_add(ring, buffer, ARRAY_PFNS * sizeof(uint32_t), 0);
        ring_wait(ring);
    }
}

static void start_ring(struct aerostat_device *device, uint32_t index, const struct ring *ring)
{
    struct aerostat_queue_config config = AEROSTAT_QUEUE_CONFIG_INIT;
    config.queue_size = ring->size;
    config.kick_fd = ring->kick_fd;
    config.call_fd = ring->call_fd;
    config.desc_gpa = ring->desc_gpa;
    config.avail_gpa = ring->avail_gpa;
    config.used_gpa = ring->used_gpa;
    OK(aerostat_device_start_queue(device, index, &config));
}

static uint32_t read_num_pages(struct aerostat_device *device)
{
    uint32_t num_pages = 0;
    OK(aerostat_device_read_config(device, 0, &num_pages, sizeof(num_pages)));
    return le32toh(num_pages);
}

/* Returns whether the device says that the value is new. */
static int write_actual(struct aerostat_device *device, uint32_t pages)
{
    uint32_t actual = htole32(pages);
    int changed = aerostat_device_write_config(device, 4, &actual, sizeof(actual));
    OK(changed);
    return changed;
}

static struct aerostat_balloon query(struct aerostat_device *device)
{
    struct aerostat_balloon balloon = AEROSTAT_BALLOON_INIT;
    OK(aerostat_device_query(device, &balloon));
    CHECK(balloon.size == sizeof(balloon));
    return balloon;
}

static struct aerostat_counters counters(struct aerostat_device *device)
{
    struct aerostat_counters counters = AEROSTAT_COUNTERS_INIT;
    OK(aerostat_device_counters(device, &counters));
    return counters;
}

/* The guest tells of its memory: two statistics, ten bytes each. */
static uint32_t write_stats(unsigned char *buffer, uint64_t available_bytes)
{
    static const uint16_t tags[] = {AEROSTAT_STAT_AVAIL, AEROSTAT_STAT_MAJFLT};
    uint64_t values[] = {available_bytes, 0};
    for (size_t i = 0; i < 2; i++) {
        uint16_t tag = htole16(tags[i]);
        uint64_t value = htole64(values[i]);
        memcpy(buffer + 10 * i, &tag, sizeof(tag));
        memcpy(buffer + 10 * i + 2, &value, sizeof(value));
    }
    return 20;
}

static void read_stats(struct aerostat_device *device, struct guest *guest, struct ring *ring)
{
    uint64_t buffer = guest_alloc(guest, PAGE_BYTES, PAGE_BYTES);
    struct aerostat_guest_stats stats = AEROSTAT_GUEST_STATS_INIT;

    /* The driver leaves its first buffer with the device, which keeps it. */
    ring_add(ring, buffer, write_stats(guest->ram + buffer, 123 << 20), 0);
    for (int tries = 0; stats.sequence == 0; tries++) {
        CHECK(tries < 1000);
        usleep(10000);
        OK(aerostat_device_guest_stats(device, 0, &stats));
    }
    CHECK(stats.present == (1u << AEROSTAT_STAT_AVAIL | 1u << AEROSTAT_STAT_MAJFLT));
    CHECK(stats.values[AEROSTAT_STAT_AVAIL] == 123 << 20);
    CHECK(stats.values[AEROSTAT_STAT_MAJFLT] == 0);
    CHECK(stats.sequence == 1);
    CHECK(ring_used_index(ring) == 0);

    /* Nobody answers here: the device asks by returning the buffer, and gives up in time. */
    CHECK(aerostat_device_guest_stats(device, 20, &stats) == -ETIMEDOUT);
    ring_wait(ring);

    /* The device can ask by itself, from time to time. */
    OK(aerostat_device_set_stats_interval(device, 10));
    ring_add(ring, buffer, write_stats(guest->ram + buffer, 124 << 20), 0);
    ring_wait(ring);
    OK(aerostat_device_set_stats_interval(device, 0));
    OK(aerostat_device_guest_stats(device, 0, &stats));
    CHECK(stats.sequence == 2 && stats.values[AEROSTAT_STAT_AVAIL] == 124 << 20);
}

int main(void)
{
    struct aerostat_runtime_config threads = AEROSTAT_RUNTIME_CONFIG_INIT;
    struct aerostat_device_config offer = AEROSTAT_DEVICE_CONFIG_INIT;
    struct aerostat_memory_region region = AEROSTAT_MEMORY_REGION_INIT;
    struct aerostat_queue_position position = AEROSTAT_QUEUE_POSITION_INIT;
    struct aerostat_runtime *runtime = NULL;
    struct aerostat_memory *memory = NULL;
    struct aerostat_device *device = NULL;
    struct guest guest;
    struct ring rings[QUEUES];
    uint64_t features = 0, before, array;
    int memfd, config_fd;

    CHECK(aerostat_version() == AEROSTAT_VERSION);

    /* The guest's memory, all of it in use. */
    memfd = memfd_create("guest", MFD_CLOEXEC);
    CHECK(memfd >= 0 && ftruncate(memfd, (off_t)RAM_BYTES) == 0);
    guest.ram_bytes = RAM_BYTES;
    guest.unused = 0;
    guest.ram = (unsigned char *)mmap(NULL, RAM_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
    CHECK(guest.ram != MAP_FAILED);
    memset(guest.ram, 0x5a, RAM_BYTES);
    before = host_bytes(memfd);
    CHECK(before == RAM_BYTES);

    /* The device. */
    OK(aerostat_runtime_new(&threads, &runtime));
    CHECK(aerostat_runtime_nodes(runtime) >= 1 && aerostat_runtime_workers(runtime) >= 1);
    config_fd = new_eventfd();
    offer.config_fd = config_fd;
    OK(aerostat_device_new(runtime, &offer, &device));
    CHECK(aerostat_device_state(device) == AEROSTAT_STATE_CONFIGURING);

    /* Its guest's memory. The device keeps what it needs of the table and the descriptor. */
    region.flags = AEROSTAT_REGION_SHARED;
    region.len_bytes = RAM_BYTES;
    region.hva = guest.ram;
    region.fd = memfd;
    OK(aerostat_memory_new(&region, 1, &memory));
    OK(aerostat_device_set_memory(device, memory));
    aerostat_memory_destroy(&memory);
    CHECK(memory == NULL);
    CHECK(query(device).memory_bytes == RAM_BYTES);

    /* The driver starts. */
    OK(aerostat_device_offered_features(device, &features));
    features &= AEROSTAT_FEATURE_VERSION_1 | AEROSTAT_FEATURE_STATS_VQ;
    CHECK(features == (AEROSTAT_FEATURE_VERSION_1 | AEROSTAT_FEATURE_STATS_VQ));
    OK(aerostat_device_set_features(device, features));
    for (uint32_t i = 0; i < QUEUES; i++) {
        ring_new(&rings[i], &guest, 128);
        start_ring(device, i, &rings[i]);
    }
    OK(aerostat_device_activate(device));
    CHECK(aerostat_device_state(device) == AEROSTAT_STATE_ACTIVE);

    /* The VMM wants memory; the guest learns of it by a configuration change interrupt. */
    OK(aerostat_device_set_target(device, BALLOON_BYTES + 1));
    CHECK(wait_eventfd(config_fd));
    CHECK(read_num_pages(device) == BALLOON_PFNS);
    CHECK(query(device).target_bytes == BALLOON_BYTES);

    /* The guest gives it, and the host has it back. */
    array = guest_alloc(&guest, ARRAY_PFNS * sizeof(uint32_t), 4);
    send_pages(&guest, &rings[INFLATE], array);
    CHECK(write_actual(device, BALLOON_PFNS) == 1);
    CHECK(write_actual(device, BALLOON_PFNS) == 0);
    CHECK(query(device).actual_bytes == BALLOON_BYTES);
    CHECK(query(device).ballooned_bytes == BALLOON_BYTES);
    CHECK(host_bytes(memfd) == before - BALLOON_BYTES);
    for (uint32_t i = 0; i < BALLOON_PFNS; i++) {
        CHECK(!page_is_resident(&guest, balloon_pfn(i)));
    }
    /* Pages in between are untouched. */
    CHECK(guest.ram[(size_t)4097 * PAGE_BYTES] == 0x5a);
    CHECK(guest.ram[(size_t)4098 * PAGE_BYTES - 1] == 0x5a);

    /* A pause: kicks wait until it is over. */
    OK(aerostat_device_pause(device));
    OK(aerostat_device_pause(device));
    CHECK(aerostat_device_state(device) == AEROSTAT_STATE_PAUSED);
    OK(aerostat_device_resume(device));

    /* The guest takes its memory back. */
    OK(aerostat_device_set_target(device, 0));
    CHECK(wait_eventfd(config_fd));
    CHECK(read_num_pages(device) == 0);
    send_pages(&guest, &rings[DEFLATE], array);
    CHECK(write_actual(device, 0) == 1);
    CHECK(query(device).ballooned_bytes == 0);
    for (uint32_t i = 0; i < BALLOON_PFNS; i++) {
        guest.ram[(size_t)balloon_pfn(i) * PAGE_BYTES] = 1;
    }
    CHECK(host_bytes(memfd) == before);

    read_stats(device, &guest, &rings[STATS]);

    /* The books say the same. */
    CHECK(counters(device).balloon.requested_bytes == BALLOON_BYTES);
    CHECK(counters(device).balloon.discarded_bytes == BALLOON_BYTES);
    CHECK(counters(device).returned_bytes == BALLOON_BYTES);
    CHECK(counters(device).inflate_chains == 2 && counters(device).deflate_chains == 2);
    CHECK(counters(device).chain_errors == 0 && counters(device).config_errors == 0);

    printf("%llu bytes given and taken back in %llu system calls\n",
           (unsigned long long)counters(device).balloon.discarded_bytes,
           (unsigned long long)counters(device).discard_calls);

    /* The end: a queue tells how far it came, and destroying waits for what is left. */
    OK(aerostat_device_stop_queue(device, INFLATE, &position));
    CHECK(position.next_avail == 2 && position.next_used == 2);
    aerostat_device_destroy(&device);
    aerostat_runtime_destroy(&runtime);
    CHECK(device == NULL && runtime == NULL);
    for (uint32_t i = 0; i < QUEUES; i++) {
        ring_close(&rings[i]);
    }
    munmap(guest.ram, guest.ram_bytes);
    close(memfd);
    close(config_fd);
    return 0;
}
