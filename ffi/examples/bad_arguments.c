/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Everything a VMM can get wrong, each with the errno that the header promises and a message, and
 * none with a crash. The output is a list of what the library says to each mistake.
 */
#include "guest.h"

#include <aerostat.h>
#include <errno.h>
#include <fcntl.h>

#define RAM_BYTES ((size_t)1 << 20)

static int mistakes;

/* Checks that a call was refused with an errno, and explained. */
static void refused(int line, const char *what, int result, int expected)
{
    const char *message = aerostat_last_error();
    if (result != -expected) {
        fprintf(stderr, "line %d: %s: got %d, expected %d (%s)\n", line, what, result, -expected,
                message);
        exit(1);
    }
    CHECK(message != NULL && message[0] != 0);
    printf("%-16s %s: %s\n", strerror(expected), what, message);
    mistakes++;
}

#define REFUSED(expected, call) refused(__LINE__, #call, (call), (expected))

/* A structure as a newer program would pass it: longer than the library knows. */
struct newer_config {
    struct aerostat_device_config config;
    uint64_t more;
};

static void bad_cgroups(struct aerostat_device *device)
{
    struct aerostat_cgroup_account account = AEROSTAT_CGROUP_ACCOUNT_INIT;

    REFUSED(EFAULT, aerostat_device_attach_cgroup(device, NULL));
    REFUSED(ENOENT, aerostat_device_attach_cgroup(device, "/nowhere/at/all"));
    REFUSED(ENOTSUP, aerostat_device_attach_cgroup(device, "/"));
    REFUSED(EFAULT, aerostat_device_query_cgroup(device, NULL));
    REFUSED(ENOTCONN, aerostat_device_query_cgroup(device, &account));
    account.size = 8;
    REFUSED(EMSGSIZE, aerostat_device_query_cgroup(device, &account));
    CHECK(aerostat_device_detach_cgroup(device) == 0); /* nothing was attached */
}

static int closed_fd(void)
{
    int fd = new_eventfd();
    close(fd);
    return fd;
}

static void bad_runtimes(void)
{
    struct aerostat_runtime_config good = AEROSTAT_RUNTIME_CONFIG_INIT, config;
    struct aerostat_runtime *runtime = (struct aerostat_runtime *)(void *)&good;

    REFUSED(EFAULT, aerostat_runtime_new(&good, NULL));
    REFUSED(EFAULT, aerostat_runtime_new(NULL, &runtime));
    CHECK(runtime == NULL); /* also if it was not before */
    config = good, config.size = 0;
    REFUSED(EMSGSIZE, aerostat_runtime_new(&config, &runtime));
    config = good, config.flags = 1;
    REFUSED(EINVAL, aerostat_runtime_new(&config, &runtime));
    config = good, config.reserved = 1;
    REFUSED(EINVAL, aerostat_runtime_new(&config, &runtime));
    config = good, config.workers_per_node = 1000000;
    REFUSED(EINVAL, aerostat_runtime_new(&config, &runtime));
    REFUSED(EFAULT, aerostat_runtime_nodes(NULL));
    REFUSED(EFAULT, aerostat_runtime_workers(NULL));

    /* What is not there is destroyed already. */
    aerostat_runtime_destroy(NULL);
    aerostat_runtime_destroy(&runtime);
}

static void bad_tables(const struct guest *guest, int memfd)
{
    struct aerostat_memory_region good = AEROSTAT_MEMORY_REGION_INIT, two[2];
    struct aerostat_memory *memory = NULL;
    int read_only = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    int event_fd = new_eventfd();
    CHECK(read_only >= 0);

    good.flags = AEROSTAT_REGION_SHARED;
    good.hva = guest->ram;
    good.len_bytes = RAM_BYTES;
    good.fd = memfd;
    two[0] = two[1] = good;

    REFUSED(EFAULT, aerostat_memory_new(NULL, 1, &memory));
    REFUSED(EFAULT, aerostat_memory_new(&good, 1, NULL));
    REFUSED(EINVAL, aerostat_memory_new(&good, 0, &memory));
    REFUSED(EINVAL, aerostat_memory_new(&good, 1 << 20, &memory));
    REFUSED(EEXIST, aerostat_memory_new(two, 2, &memory));
    two[1].gpa = RAM_BYTES - PAGE_BYTES;
    REFUSED(EEXIST, aerostat_memory_new(two, 2, &memory));
    two[1].gpa = RAM_BYTES, two[1].size = sizeof(two[1]) + 8;
    REFUSED(EINVAL, aerostat_memory_new(two, 2, &memory));

    two[0] = good, two[0].size = 8;
    REFUSED(EMSGSIZE, aerostat_memory_new(two, 1, &memory));
    two[0] = good, two[0].size = 1 << 30;
    REFUSED(E2BIG, aerostat_memory_new(two, 1, &memory));
    two[0] = good, two[0].flags = 1u << 31;
    REFUSED(EINVAL, aerostat_memory_new(two, 1, &memory));
    two[0] = good, two[0].reserved = 1;
    REFUSED(EINVAL, aerostat_memory_new(two, 1, &memory));
    two[0] = good, two[0].hva = NULL;
    REFUSED(EFAULT, aerostat_memory_new(two, 1, &memory));
    two[0] = good, two[0].hva = guest->ram + 1;
    REFUSED(EADDRNOTAVAIL, aerostat_memory_new(two, 1, &memory));
    two[0] = good, two[0].gpa = 512;
    REFUSED(EADDRNOTAVAIL, aerostat_memory_new(two, 1, &memory));
    two[0] = good, two[0].len_bytes -= 1;
    REFUSED(EADDRNOTAVAIL, aerostat_memory_new(two, 1, &memory));
    two[0] = good, two[0].fd_offset_bytes = 1, two[0].len_bytes = PAGE_BYTES;
    REFUSED(EADDRNOTAVAIL, aerostat_memory_new(two, 1, &memory));
    two[0] = good, two[0].len_bytes = 0;
    REFUSED(EINVAL, aerostat_memory_new(two, 1, &memory));
    two[0] = good, two[0].page_size_bytes = 5000;
    REFUSED(EINVAL, aerostat_memory_new(two, 1, &memory));
    two[0] = good, two[0].page_size_bytes = 2 << 20;
    REFUSED(EADDRNOTAVAIL, aerostat_memory_new(two, 1, &memory));
    two[0] = good, two[0].node = -2;
    REFUSED(EINVAL, aerostat_memory_new(two, 1, &memory));
    two[0] = good, two[0].gpa = UINT64_MAX - PAGE_BYTES + 1;
    REFUSED(ERANGE, aerostat_memory_new(two, 1, &memory));
    two[0] = good, two[0].fd_offset_bytes = PAGE_BYTES;
    REFUSED(ERANGE, aerostat_memory_new(two, 1, &memory));
    two[0] = good, two[0].fd_offset_bytes = UINT64_MAX - PAGE_BYTES + 1;
    REFUSED(ERANGE, aerostat_memory_new(two, 1, &memory));
    two[0] = good, two[0].fd = closed_fd();
    REFUSED(EBADF, aerostat_memory_new(two, 1, &memory));
    two[0] = good, two[0].fd = -2;
    REFUSED(EBADF, aerostat_memory_new(two, 1, &memory));
    two[0] = good, two[0].fd = event_fd;
    REFUSED(EBADF, aerostat_memory_new(two, 1, &memory));
    two[0] = good, two[0].fd = read_only, two[0].len_bytes = PAGE_BYTES;
    REFUSED(EBADF, aerostat_memory_new(two, 1, &memory));
    CHECK(memory == NULL);

    /* A ROM's file need not be open for writing. */
    two[0].flags |= AEROSTAT_REGION_READONLY;
    OK(aerostat_memory_new(two, 1, &memory));
    aerostat_memory_destroy(&memory);
    CHECK(memory == NULL);
    aerostat_memory_destroy(&memory);
    aerostat_memory_destroy(NULL);
    close(read_only);
    close(event_fd);
}

static void bad_devices(struct aerostat_runtime *runtime, int memfd)
{
    struct aerostat_device_config good = AEROSTAT_DEVICE_CONFIG_INIT, config;
    struct newer_config newer;
    struct aerostat_device *device = NULL;

    REFUSED(EFAULT, aerostat_device_new(NULL, &good, &device));
    REFUSED(EFAULT, aerostat_device_new(runtime, NULL, &device));
    REFUSED(EFAULT, aerostat_device_new(runtime, &good, NULL));
    config = good, config.size = 8;
    REFUSED(EMSGSIZE, aerostat_device_new(runtime, &config, &device));
    config = good, config.kind = 99;
    REFUSED(EINVAL, aerostat_device_new(runtime, &config, &device));
    config = good, config.flags = 4;
    REFUSED(EINVAL, aerostat_device_new(runtime, &config, &device));
    config = good, config.reserved = 1;
    REFUSED(EINVAL, aerostat_device_new(runtime, &config, &device));
    config = good, config.features = (uint64_t)1 << 63;
    REFUSED(ENOTSUP, aerostat_device_new(runtime, &config, &device));
    config = good, config.config_fd = closed_fd();
    REFUSED(EBADF, aerostat_device_new(runtime, &config, &device));
    config = good, config.config_fd = memfd;
    REFUSED(EBADF, aerostat_device_new(runtime, &config, &device));
    config = good, config.completion_fd = -7;
    REFUSED(EBADF, aerostat_device_new(runtime, &config, &device));

    /* A newer program is served as long as it asks for nothing new. */
    memset(&newer, 0, sizeof(newer));
    newer.config = good;
    newer.config.size = sizeof(newer);
    newer.more = 1;
    REFUSED(E2BIG, aerostat_device_new(runtime, &newer.config, &device));
    CHECK(device == NULL);
    newer.more = 0;
    OK(aerostat_device_new(runtime, &newer.config, &device));
    aerostat_device_destroy(&device);
    CHECK(device == NULL);
    aerostat_device_destroy(&device);
    aerostat_device_destroy(NULL);
}

static void no_device(void)
{
    struct aerostat_queue_config queue = AEROSTAT_QUEUE_CONFIG_INIT;
    struct aerostat_queue_position position = AEROSTAT_QUEUE_POSITION_INIT;
    struct aerostat_balloon balloon = AEROSTAT_BALLOON_INIT;
    struct aerostat_node_balloon node = AEROSTAT_NODE_BALLOON_INIT;
    struct aerostat_guest_stats stats = AEROSTAT_GUEST_STATS_INIT;
    struct aerostat_counters counters = AEROSTAT_COUNTERS_INIT;
    struct aerostat_element element;
    struct aerostat_completion completion;
    uint64_t features;
    uint32_t status;
    size_t size;
    memset(&element, 0, sizeof(element));

    REFUSED(EFAULT, aerostat_device_state(NULL));
    REFUSED(EFAULT, aerostat_device_set_memory(NULL, NULL));
    REFUSED(EFAULT, aerostat_device_offered_features(NULL, &features));
    REFUSED(EFAULT, aerostat_device_features(NULL, &features));
    REFUSED(EFAULT, aerostat_device_set_features(NULL, 0));
    REFUSED(EFAULT, aerostat_device_start_queue(NULL, 0, &queue));
    REFUSED(EFAULT, aerostat_device_stop_queue(NULL, 0, &position));
    REFUSED(EFAULT, aerostat_device_set_queue_call(NULL, 0, -1));
    REFUSED(EFAULT, aerostat_device_activate(NULL));
    REFUSED(EFAULT, aerostat_device_pause(NULL));
    REFUSED(EFAULT, aerostat_device_resume(NULL));
    REFUSED(EFAULT, aerostat_device_reset(NULL));
    REFUSED(EFAULT, aerostat_device_reset_balloon(NULL));
    REFUSED(EFAULT, aerostat_device_inhibit(NULL));
    REFUSED(EFAULT, aerostat_device_uninhibit(NULL));
    REFUSED(EFAULT, aerostat_device_read_config(NULL, 0, &features, 8));
    REFUSED(EFAULT, aerostat_device_write_config(NULL, 0, &features, 8));
    REFUSED(EFAULT, aerostat_device_set_target(NULL, 0));
    REFUSED(EFAULT, aerostat_device_set_node_targets(NULL, &features, 1));
    REFUSED(EFAULT, aerostat_device_query_node(NULL, 0, &node));
    REFUSED(EFAULT, aerostat_device_set_extra_grant(NULL, 0));
    REFUSED(EFAULT, aerostat_vmware_command(NULL, 0, 0, 0, &status, &features));
    REFUSED(EFAULT, aerostat_device_query(NULL, &balloon));
    REFUSED(EFAULT, aerostat_device_guest_stats(NULL, 0, &stats));
    REFUSED(EFAULT, aerostat_device_set_stats_interval(NULL, 0));
    REFUSED(EFAULT, aerostat_device_set_write_behind(NULL, 0, 0));
    REFUSED(EFAULT, aerostat_device_flush(NULL));
    REFUSED(EFAULT, aerostat_device_set_deflate(NULL, 0));
    REFUSED(EFAULT, aerostat_device_start_hints(NULL, 1));
    REFUSED(EFAULT, aerostat_device_finish_hints(NULL));
    REFUSED(EFAULT, aerostat_device_take_hints(NULL, NULL, 0, NULL));
    REFUSED(EFAULT, aerostat_runtime_discard(NULL, NULL, NULL, 0, NULL));
    REFUSED(EFAULT, aerostat_device_history(NULL, 0, NULL, 0));
    REFUSED(EFAULT, aerostat_device_attach_cgroup(NULL, "/sys/fs/cgroup"));
    REFUSED(EFAULT, aerostat_device_detach_cgroup(NULL));
    REFUSED(EFAULT, aerostat_device_query_cgroup(NULL, NULL));
    REFUSED(EFAULT, aerostat_device_save(NULL, NULL, 0, &size));
    REFUSED(EFAULT, aerostat_device_restore(NULL, &counters, 8));
    REFUSED(EFAULT, aerostat_device_saved_position(NULL, 0, &position));
    REFUSED(EFAULT, aerostat_device_counters(NULL, &counters));
    REFUSED(EFAULT, aerostat_device_node_counters(NULL, -1, &counters));
    REFUSED(EFAULT, aerostat_device_submit(NULL, &element, 1));
    REFUSED(EFAULT, aerostat_device_completions(NULL, &completion, 1));
}

static void bad_outputs(struct aerostat_device *device, struct aerostat_runtime *runtime)
{
    struct aerostat_balloon balloon = AEROSTAT_BALLOON_INIT;
    struct aerostat_node_balloon node = AEROSTAT_NODE_BALLOON_INIT;
    struct aerostat_guest_stats stats;
    struct aerostat_counters counters;
    uint64_t word = 0;
    memset(&stats, 0, sizeof(stats));
    memset(&counters, 0, sizeof(counters));

    REFUSED(EFAULT, aerostat_device_offered_features(device, NULL));
    REFUSED(EFAULT, aerostat_device_features(device, NULL));
    REFUSED(EFAULT, aerostat_device_query(device, NULL));
    balloon.size = 8;
    REFUSED(EMSGSIZE, aerostat_device_query(device, &balloon));
    REFUSED(EFAULT, aerostat_device_query_node(device, 0, NULL));
    node.size = 8;
    REFUSED(EMSGSIZE, aerostat_device_query_node(device, 0, &node));
    REFUSED(EFAULT, aerostat_device_guest_stats(device, 0, NULL));
    REFUSED(EMSGSIZE, aerostat_device_guest_stats(device, 0, &stats));
    REFUSED(EFAULT, aerostat_device_counters(device, NULL));
    REFUSED(EMSGSIZE, aerostat_device_counters(device, &counters));
    REFUSED(EFAULT, aerostat_device_node_counters(device, -1, NULL));
    counters.size = sizeof(counters);
    REFUSED(EINVAL, aerostat_device_node_counters(device, -2, &counters));
    REFUSED(ENXIO, aerostat_device_node_counters(device, aerostat_runtime_nodes(runtime), &counters));
    REFUSED(EFAULT, aerostat_device_read_config(device, 0, NULL, 4));
    REFUSED(EFAULT, aerostat_device_write_config(device, 0, NULL, 4));

    /* A guest may read and write anywhere in the configuration space, and behind it. */
    word = UINT64_MAX;
    OK(aerostat_device_read_config(device, UINT64_MAX, &word, sizeof(word)));
    CHECK(word == 0);
    OK(aerostat_device_write_config(device, UINT64_MAX, &word, sizeof(word)));
    OK(aerostat_device_read_config(device, 0, NULL, 0));
}

static void bad_queues(struct aerostat_device *device, const struct ring *ring, int memfd)
{
    struct aerostat_queue_config good = AEROSTAT_QUEUE_CONFIG_INIT, config;
    struct aerostat_queue_position position = AEROSTAT_QUEUE_POSITION_INIT;
    good.queue_size = ring->size;
    good.kick_fd = ring->kick_fd;
    good.call_fd = ring->call_fd;
    good.desc_gpa = ring->desc_gpa;
    good.avail_gpa = ring->avail_gpa;
    good.used_gpa = ring->used_gpa;

    REFUSED(EFAULT, aerostat_device_start_queue(device, 0, NULL));
    config = good, config.size = 4;
    REFUSED(EMSGSIZE, aerostat_device_start_queue(device, 0, &config));
    config = good, config.flags = 1u << 7;
    REFUSED(EINVAL, aerostat_device_start_queue(device, 0, &config));
    config = good, config.reserved = 1;
    REFUSED(EINVAL, aerostat_device_start_queue(device, 0, &config));
    config = good, config.queue_size = 0;
    REFUSED(EINVAL, aerostat_device_start_queue(device, 0, &config));
    config = good, config.queue_size = 100;
    REFUSED(EINVAL, aerostat_device_start_queue(device, 0, &config));
    config = good, config.kick_fd = -1;
    REFUSED(EBADF, aerostat_device_start_queue(device, 0, &config));
    config = good, config.kick_fd = memfd;
    REFUSED(EBADF, aerostat_device_start_queue(device, 0, &config));
    config = good, config.call_fd = closed_fd();
    REFUSED(EBADF, aerostat_device_start_queue(device, 0, &config));
    config = good, config.desc_gpa += 8;
    REFUSED(EADDRNOTAVAIL, aerostat_device_start_queue(device, 0, &config));
    config = good, config.avail_gpa += 1;
    REFUSED(EADDRNOTAVAIL, aerostat_device_start_queue(device, 0, &config));
    config = good, config.used_gpa += 2;
    REFUSED(EADDRNOTAVAIL, aerostat_device_start_queue(device, 0, &config));
    config = good, config.desc_gpa = RAM_BYTES;
    REFUSED(ERANGE, aerostat_device_start_queue(device, 0, &config));
    config = good, config.used_gpa = RAM_BYTES - 4;
    REFUSED(ERANGE, aerostat_device_start_queue(device, 0, &config));
    config = good, config.avail_gpa = UINT64_MAX - 1;
    REFUSED(ERANGE, aerostat_device_start_queue(device, 0, &config));
    REFUSED(ENOENT, aerostat_device_start_queue(device, 5, &good));
    REFUSED(ENOENT, aerostat_device_start_queue(device, UINT32_MAX, &good));
    REFUSED(ENOENT, aerostat_device_stop_queue(device, 0, &position));
    REFUSED(ENOENT, aerostat_device_set_queue_call(device, 0, ring->call_fd));

    OK(aerostat_device_start_queue(device, 0, &good));
    REFUSED(EALREADY, aerostat_device_start_queue(device, 0, &good));
    REFUSED(EALREADY, aerostat_device_set_features(device, AEROSTAT_FEATURE_VERSION_1));
    REFUSED(EBADF, aerostat_device_set_queue_call(device, 0, memfd));
    REFUSED(EFAULT, aerostat_device_stop_queue(device, 0, NULL));
    position.size = 1;
    REFUSED(EMSGSIZE, aerostat_device_stop_queue(device, 0, &position));
}

/* Submits without ever collecting. */
static void too_many_elements(struct aerostat_device *device, const struct aerostat_element *good)
{
    enum { MOST = 65536 };
    struct aerostat_element *elements =
        (struct aerostat_element *)calloc(MOST + 1, sizeof(struct aerostat_element));
    struct aerostat_completion *done =
        (struct aerostat_completion *)calloc(MOST + 1, sizeof(struct aerostat_completion));
    int collected = 0;
    CHECK(elements != NULL && done != NULL);
    for (size_t i = 0; i <= MOST; i++) {
        elements[i] = *good;
        elements[i].token = i;
    }
    REFUSED(EINVAL, aerostat_device_submit(device, elements, MOST + 1));
    OK(aerostat_device_submit(device, elements, MOST));
    REFUSED(EAGAIN, aerostat_device_submit(device, elements, 1));
    while (collected < MOST) {
        int count = aerostat_device_completions(device, done + collected, MOST + 1);
        OK(count);
        collected += count;
        usleep(count == 0 ? 1000 : 0);
    }
    for (int i = 0; i < MOST; i++) {
        CHECK(done[i].token == (uint64_t)i);
    }
    /* There is room again. */
    OK(aerostat_device_submit(device, elements, 1));
    while (aerostat_device_completions(device, done, 1) == 0) {
        usleep(1000);
    }
    free(elements);
    free(done);
}

static void bad_elements(struct aerostat_device *device)
{
    struct aerostat_element good, element;
    uint32_t pfn = htole32(1);
    struct iovec part;
    memset(&good, 0, sizeof(good));
    part.iov_base = &pfn, part.iov_len = sizeof(pfn);
    good.queue = 1;
    good.readable = &part;
    good.n_readable = 1;

    REFUSED(EFAULT, aerostat_device_submit(device, NULL, 1));
    REFUSED(EFAULT, aerostat_device_completions(device, NULL, 1));
    element = good, element.flags = 2;
    REFUSED(EINVAL, aerostat_device_submit(device, &element, 1));
    element = good, element.readable = NULL;
    REFUSED(EFAULT, aerostat_device_submit(device, &element, 1));
    element = good, element.n_writable = 1;
    REFUSED(EFAULT, aerostat_device_submit(device, &element, 1));
    element = good, element.n_readable = UINT32_MAX;
    REFUSED(EINVAL, aerostat_device_submit(device, &element, 1));
    part.iov_base = NULL;
    REFUSED(EFAULT, aerostat_device_submit(device, &good, 1));
    part.iov_base = &pfn, part.iov_len = SIZE_MAX;
    REFUSED(ERANGE, aerostat_device_submit(device, &good, 1));
    part.iov_len = sizeof(pfn);
    element = good, element.queue = 5;
    REFUSED(ENOENT, aerostat_device_submit(device, &element, 1));
    OK(aerostat_device_submit(device, NULL, 0));
    CHECK(aerostat_device_completions(device, NULL, 0) == 0);
    too_many_elements(device, &good);
}

/* Saved states that are none, or not for this device. */
static void bad_states(struct aerostat_device *device)
{
    struct aerostat_queue_position position = AEROSTAT_QUEUE_POSITION_INIT;
    unsigned char state[4096];
    size_t size = 0, cut;

    REFUSED(EFAULT, aerostat_device_history(device, 0, NULL, 1));
    CHECK(aerostat_device_history(device, 0, NULL, 0) == 0);
    bad_cgroups(device);
    REFUSED(EFAULT, aerostat_device_save(device, state, sizeof(state), NULL));
    REFUSED(EFAULT, aerostat_device_save(device, NULL, 1, &size));
    OK(aerostat_device_save(device, NULL, 0, &size));
    CHECK(size > 0 && size < sizeof(state));
    REFUSED(ENOBUFS, aerostat_device_save(device, state, size - 1, &size));
    OK(aerostat_device_save(device, state, sizeof(state), &size));
    REFUSED(EFAULT, aerostat_device_restore(device, NULL, size));
    for (cut = 0; cut < size; cut++)
        CHECK(aerostat_device_restore(device, state, cut) == -EBADMSG);
    REFUSED(EBADMSG, aerostat_device_restore(device, state, size - 1));
    state[9]++; /* the version's second byte */
    REFUSED(EPROTONOSUPPORT, aerostat_device_restore(device, state, size));
    state[9]--;
    state[50] ^= 1;
    REFUSED(EBADMSG, aerostat_device_restore(device, state, size));
    state[50] ^= 1;
    REFUSED(ENOENT, aerostat_device_saved_position(device, 0, &position));
    OK(aerostat_device_restore(device, state, size));
    REFUSED(ENOENT, aerostat_device_saved_position(device, 0, &position));
    REFUSED(ENOENT, aerostat_device_saved_position(device, 5, &position));
    REFUSED(EFAULT, aerostat_device_saved_position(device, 0, NULL));
    position.size = 1;
    REFUSED(EMSGSIZE, aerostat_device_saved_position(device, 0, &position));
}

/* Calls at the wrong time, from making a device to its reset. */
static void wrong_order(struct aerostat_runtime *runtime, struct guest *guest, int memfd)
{
    struct aerostat_device_config offer = AEROSTAT_DEVICE_CONFIG_INIT;
    struct aerostat_memory_region region = AEROSTAT_MEMORY_REGION_INIT;
    struct aerostat_queue_config element_queue = AEROSTAT_QUEUE_CONFIG_INIT;
    struct aerostat_device *device = NULL;
    struct aerostat_memory *memory = NULL, *elsewhere = NULL;
    struct aerostat_guest_stats stats = AEROSTAT_GUEST_STATS_INIT;
    struct aerostat_element element;
    struct ring ring;
    uint32_t status;
    uint64_t offered = 0;
    memset(&element, 0, sizeof(element));
    element_queue.flags = AEROSTAT_QUEUE_ELEMENT;
    region.flags = AEROSTAT_REGION_SHARED;
    region.hva = guest->ram;
    region.len_bytes = RAM_BYTES;
    region.fd = memfd;
    OK(aerostat_memory_new(&region, 1, &memory));
    region.gpa = (uint64_t)1 << 40;
    OK(aerostat_memory_new(&region, 1, &elsewhere));

    OK(aerostat_device_new(runtime, &offer, &device));
    REFUSED(ENOTCONN, aerostat_device_activate(device));
    REFUSED(ENOTCONN, aerostat_device_pause(device));
    REFUSED(EPROTO, aerostat_device_resume(device));
    REFUSED(EPROTO, aerostat_device_uninhibit(device));
    REFUSED(ENOTSUP, aerostat_device_set_extra_grant(device, 0));
    REFUSED(EFAULT, aerostat_device_set_node_targets(device, NULL, 1));
    REFUSED(EINVAL, aerostat_device_set_node_targets(device, &offered, 17));
    REFUSED(ENOTSUP, aerostat_device_set_node_targets(device, &offered, 1));
    REFUSED(ENOTSUP, aerostat_vmware_command(device, 0, 0, 0, &status, &offered));
    REFUSED(EINVAL, aerostat_device_set_target(device, UINT64_MAX));
    REFUSED(ENOTCONN, aerostat_device_start_queue(device, 0, &element_queue));
    OK(aerostat_device_offered_features(device, &offered));
    REFUSED(ENOTSUP, aerostat_device_set_features(device, ~offered));
    REFUSED(EFAULT, aerostat_device_set_memory(device, NULL));
    OK(aerostat_device_set_features(device, AEROSTAT_FEATURE_VERSION_1));
    REFUSED(ENOTCONN, aerostat_device_activate(device));
    REFUSED(ENOTCONN, aerostat_device_restore(device, "AEROSTAT", 8));
    OK(aerostat_device_set_memory(device, memory));
    REFUSED(EINVAL, aerostat_device_set_target(device, RAM_BYTES + PAGE_BYTES));
    REFUSED(ENOTCONN, aerostat_device_submit(device, &element, 1));
    REFUSED(ENOTCONN, aerostat_device_guest_stats(device, 1, &stats));

    bad_states(device);
    ring_new(&ring, guest, 64);
    bad_outputs(device, runtime);
    bad_queues(device, &ring, memfd);
    OK(aerostat_device_start_queue(device, 1, &element_queue));
    OK(aerostat_device_activate(device));
    bad_elements(device);
    REFUSED(EALREADY, aerostat_device_activate(device));
    REFUSED(EALREADY, aerostat_device_restore(device, "AEROSTAT", 8));
    REFUSED(EALREADY, aerostat_device_set_features(device, 0));
    REFUSED(EPROTO, aerostat_device_resume(device));
    REFUSED(ERANGE, aerostat_device_set_memory(device, elsewhere));
    REFUSED(ENOTSUP, aerostat_device_guest_stats(device, 1, &stats));
    REFUSED(ENOTSUP, aerostat_device_start_hints(device, 1));
    REFUSED(EPROTO, aerostat_device_finish_hints(device));
    REFUSED(EFAULT, aerostat_device_take_hints(device, NULL, 1, NULL));

    OK(aerostat_device_pause(device));
    REFUSED(EBUSY, aerostat_device_activate(device));
    REFUSED(EBUSY, aerostat_device_submit(device, &element, 1));
    REFUSED(EBUSY, aerostat_device_guest_stats(device, 1, &stats));
    OK(aerostat_device_reset(device));
    REFUSED(EPROTO, aerostat_device_resume(device));

    /* The device still works. */
    OK(aerostat_device_set_features(device, AEROSTAT_FEATURE_VERSION_1));
    OK(aerostat_device_start_queue(device, 0, &element_queue));
    OK(aerostat_device_activate(device));
    CHECK(aerostat_device_state(device) == AEROSTAT_STATE_ACTIVE);
    aerostat_device_destroy(&device);
    aerostat_memory_destroy(&memory);
    aerostat_memory_destroy(&elsewhere);
    ring_close(&ring);
}

int main(void)
{
    struct aerostat_runtime_config threads = AEROSTAT_RUNTIME_CONFIG_INIT;
    struct aerostat_runtime *runtime = NULL;
    struct guest guest;
    int memfd = memfd_create("guest", MFD_CLOEXEC);

    CHECK(memfd >= 0 && ftruncate(memfd, (off_t)RAM_BYTES) == 0);
    guest.ram_bytes = RAM_BYTES;
    guest.unused = 0;
    guest.ram = (unsigned char *)mmap(NULL, RAM_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
    CHECK(guest.ram != MAP_FAILED);

    CHECK(aerostat_last_error() != NULL && aerostat_last_error()[0] == 0);
    REFUSED(EINVAL, aerostat_set_log(NULL, NULL, 99));
    OK(aerostat_set_log(NULL, NULL, AEROSTAT_LOG_OFF));
    bad_runtimes();
    threads.workers_per_node = 1;
    OK(aerostat_runtime_new(&threads, &runtime));
    bad_tables(&guest, memfd);
    bad_devices(runtime, memfd);
    no_device();
    wrong_order(runtime, &guest, memfd);
    aerostat_runtime_destroy(&runtime);
    munmap(guest.ram, guest.ram_bytes);
    close(memfd);
    printf("%d mistakes refused\n", mistakes);
    return 0;
}
