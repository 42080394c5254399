/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A VMM that keeps its virtqueues to itself, as QEMU does: it pops the guest's buffers, submits them
 * as iovecs with a token, and pushes them when the library is done with them. Everything happens in
 * its own main loop; the library never calls it.
 *
 *     cc element.c -laerostat && ./a.out
 */
#include "guest.h"

#include <aerostat.h>

#define RAM_BYTES ((size_t)16 << 20)
#define BALLOON_PFNS 512u
#define BALLOON_BYTES ((uint64_t)BALLOON_PFNS * PAGE_BYTES)
#define FIRST_PFN 1024u
#define REPORTED_PFN 2048u
#define REPORTED_BYTES ((size_t)2 << 20)

enum { INFLATE, DEFLATE, REPORTING, QUEUES };

/* A buffer that the VMM popped: QEMU's VirtQueueElement. Its address is the token. */
struct popped {
    uint32_t queue;
    struct iovec parts[2];
    uint32_t n_parts;
    int writable;
    int pushed;
    uint32_t written_bytes;
    uint16_t flags;
};

static void submit_with(struct aerostat_device *device, struct popped *popped, uint32_t flags)
{
    struct aerostat_element element;
    memset(&element, 0, sizeof(element));
    element.token = (uint64_t)(uintptr_t)popped;
    element.queue = popped->queue;
    element.flags = flags;
    if (popped->writable) {
        element.writable = popped->parts;
        element.n_writable = popped->n_parts;
    } else {
        element.readable = popped->parts;
        element.n_readable = popped->n_parts;
    }
    OK(aerostat_device_submit(device, &element, 1));
}

static void submit(struct aerostat_device *device, struct popped *popped)
{
    submit_with(device, popped, 0);
}

/* What the main loop does when completion_fd is readable: virtqueue_push() and notify. */
static int push_completed(struct aerostat_device *device)
{
    struct aerostat_completion done[8];
    int count, pushed = 0;
    do {
        count = aerostat_device_completions(device, done, 8);
        OK(count);
        for (int i = 0; i < count; i++) {
            struct popped *popped = (struct popped *)(uintptr_t)done[i].token;
            CHECK(!popped->pushed && popped->queue == done[i].queue);
            popped->pushed = 1;
            popped->written_bytes = done[i].written_bytes;
            popped->flags = done[i].flags;
            pushed++;
        }
    } while (count == 8);
    return pushed;
}

/* The main loop, until so many buffers were pushed. */
static void run(struct aerostat_device *device, int completion_fd, int expected)
{
    while (expected > 0) {
        CHECK(wait_eventfd(completion_fd));
        expected -= push_completed(device);
    }
    CHECK(expected == 0);
}

/* A buffer with page frame numbers, which the guest happened to put into two pieces. */
static struct popped pop_pfns(uint32_t queue, unsigned char *buffer, uint32_t first, uint32_t count)
{
    struct popped popped;
    memset(&popped, 0, sizeof(popped));
    for (uint32_t i = 0; i < count; i++) {
        put_pfn(buffer, i, first + i);
    }
    popped.queue = queue;
    popped.parts[0].iov_base = buffer;
    popped.parts[0].iov_len = 6; /* in the middle of a number */
    popped.parts[1].iov_base = buffer + 6;
    popped.parts[1].iov_len = count * sizeof(uint32_t) - 6;
    popped.n_parts = 2;
    return popped;
}

static int balloon_is_resident(const struct guest *guest)
{
    for (uint32_t i = 0; i < BALLOON_PFNS; i++) {
        if (page_is_resident(guest, FIRST_PFN + i)) {
            return 1;
        }
    }
    return 0;
}

static struct aerostat_balloon query(struct aerostat_device *device)
{
    struct aerostat_balloon balloon = AEROSTAT_BALLOON_INIT;
    OK(aerostat_device_query(device, &balloon));
    return balloon;
}

/* The count of pages may follow a moment after the completion. */
static int balloon_becomes(struct aerostat_device *device, uint64_t bytes)
{
    for (int tries = 0; tries < 1000; tries++) {
        if (query(device).ballooned_bytes == bytes) {
            return 1;
        }
        usleep(10000);
    }
    return 0;
}

static struct aerostat_counters counters(struct aerostat_device *device)
{
    struct aerostat_counters counters = AEROSTAT_COUNTERS_INIT;
    OK(aerostat_device_counters(device, &counters));
    return counters;
}

/* The driver starts: also after it has reset the device. */
static void start(struct aerostat_device *device)
{
    uint64_t features = 0;
    OK(aerostat_device_offered_features(device, &features));
    features &= AEROSTAT_FEATURE_VERSION_1 | AEROSTAT_FEATURE_PAGE_REPORTING;
    OK(aerostat_device_set_features(device, features));
    for (uint32_t i = 0; i < QUEUES; i++) {
        struct aerostat_queue_config config = AEROSTAT_QUEUE_CONFIG_INIT;
        config.flags = AEROSTAT_QUEUE_ELEMENT;
        config.queue_size = 128;
        OK(aerostat_device_start_queue(device, i, &config));
    }
    OK(aerostat_device_activate(device));
}

int main(void)
{
    struct aerostat_runtime_config threads = AEROSTAT_RUNTIME_CONFIG_INIT;
    struct aerostat_device_config offer = AEROSTAT_DEVICE_CONFIG_INIT;
    struct aerostat_memory_region regions[2] = {AEROSTAT_MEMORY_REGION_INIT,
                                                AEROSTAT_MEMORY_REGION_INIT};
    struct aerostat_runtime *runtime = NULL;
    struct aerostat_memory *memory = NULL;
    struct aerostat_device *device = NULL;
    struct popped popped[2];
    unsigned char buffers[2][1024];
    struct guest guest;
    int completion_fd;

    /* Private anonymous memory, in two regions as on a PC. */
    guest.ram_bytes = RAM_BYTES;
    guest.unused = 0;
    guest.ram = (unsigned char *)mmap(NULL, RAM_BYTES, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(guest.ram != MAP_FAILED);
    madvise(guest.ram, RAM_BYTES, MADV_NOHUGEPAGE);
    memset(guest.ram, 0x5a, RAM_BYTES);
    for (size_t i = 0; i < 2; i++) {
        regions[i].gpa = i * (RAM_BYTES / 2);
        regions[i].hva = guest.ram + i * (RAM_BYTES / 2);
        regions[i].len_bytes = RAM_BYTES / 2;
    }

    OK(aerostat_runtime_new(&threads, &runtime));
    completion_fd = new_eventfd();
    offer.completion_fd = completion_fd;
    OK(aerostat_device_new(runtime, &offer, &device));
    OK(aerostat_memory_new(regions, 2, &memory));
    OK(aerostat_device_set_memory(device, memory));
    start(device);

    /* Two buffers at once. */
    popped[0] = pop_pfns(INFLATE, buffers[0], FIRST_PFN, 256);
    popped[1] = pop_pfns(INFLATE, buffers[1], FIRST_PFN + 256, 256);
    submit(device, &popped[0]);
    submit(device, &popped[1]);
    run(device, completion_fd, 2);
    CHECK(popped[0].written_bytes == 0 && popped[0].flags == 0);
    CHECK(!balloon_is_resident(&guest));
    CHECK(balloon_becomes(device, BALLOON_BYTES));

    /* The VM stops: what was submitted before is served when the call returns. */
    popped[0] = pop_pfns(DEFLATE, buffers[0], FIRST_PFN, 256);
    submit(device, &popped[0]);
    OK(aerostat_device_pause(device));
    CHECK(push_completed(device) == 1 && popped[0].flags == 0);
    CHECK(balloon_becomes(device, BALLOON_BYTES / 2));
    OK(aerostat_device_resume(device));
    CHECK(wait_eventfd(completion_fd));

    /* On this thread, without waking another one, unless a worker is with the device just now. */
    popped[0] = pop_pfns(INFLATE, buffers[0], FIRST_PFN, 256);
    submit_with(device, &popped[0], AEROSTAT_ELEMENT_HERE);
    run(device, completion_fd, 1);
    CHECK(!page_is_resident(&guest, FIRST_PFN));
    popped[0] = pop_pfns(DEFLATE, buffers[0], FIRST_PFN, 256);
    submit_with(device, &popped[0], AEROSTAT_ELEMENT_HERE);
    run(device, completion_fd, 1);
    CHECK(balloon_becomes(device, BALLOON_BYTES / 2));

    /* Reported pages are freed as well, but stay the guest's. */
    memset(&popped[0], 0, sizeof(popped[0]));
    popped[0].queue = REPORTING;
    popped[0].writable = 1;
    popped[0].parts[0].iov_base = guest.ram + (size_t)REPORTED_PFN * PAGE_BYTES;
    popped[0].parts[0].iov_len = REPORTED_BYTES;
    popped[0].n_parts = 1;
    submit(device, &popped[0]);
    run(device, completion_fd, 1);
    CHECK(!page_is_resident(&guest, REPORTED_PFN));
    CHECK(!page_is_resident(&guest, REPORTED_PFN + 511));
    CHECK(page_is_resident(&guest, REPORTED_PFN - 1));
    CHECK(page_is_resident(&guest, REPORTED_PFN + 512));
    CHECK(counters(device).report.discarded_bytes == REPORTED_BYTES);
    CHECK(balloon_becomes(device, BALLOON_BYTES / 2));

    /* Device assignment begins: the guest is served, its memory stays. */
    OK(aerostat_device_inhibit(device));
    popped[0] = pop_pfns(INFLATE, buffers[0], 0, 256);
    submit(device, &popped[0]);
    run(device, completion_fd, 1);
    CHECK(page_is_resident(&guest, 0) && guest.ram[0] == 0x5a);
    CHECK(counters(device).balloon.skipped_inhibited_bytes == 256 * PAGE_BYTES);
    OK(aerostat_device_uninhibit(device));

    /* What cannot be served comes back as such. */
    popped[1] = pop_pfns(QUEUES, buffers[1], 512, 256);
    submit(device, &popped[1]);
    run(device, completion_fd, 1);
    CHECK(popped[1].flags == AEROSTAT_COMPLETION_UNSERVED);
    CHECK(page_is_resident(&guest, 512));

    /* A reset: what was submitted comes back, served or not, and nothing comes later. */
    popped[1] = pop_pfns(INFLATE, buffers[1], 256, 256);
    submit(device, &popped[1]);
    OK(aerostat_device_reset(device));
    CHECK(push_completed(device) == 1 && popped[1].pushed);
    CHECK(push_completed(device) == 0);
    CHECK(wait_eventfd(completion_fd));
    CHECK(balloon_becomes(device, 0));
    CHECK(query(device).state == AEROSTAT_STATE_CONFIGURING);

    /* The driver starts again. */
    start(device);
    popped[0] = pop_pfns(INFLATE, buffers[0], 512, 256);
    submit(device, &popped[0]);
    run(device, completion_fd, 1);
    CHECK(!page_is_resident(&guest, 512));

    printf("%llu bytes given, %llu reported, %llu kept while inhibited\n",
           (unsigned long long)counters(device).balloon.discarded_bytes,
           (unsigned long long)counters(device).report.discarded_bytes,
           (unsigned long long)counters(device).balloon.skipped_inhibited_bytes);

    aerostat_device_destroy(&device);
    aerostat_memory_destroy(&memory);
    aerostat_runtime_destroy(&runtime);
    munmap(guest.ram, guest.ram_bytes);
    close(completion_fd);
    return 0;
}
