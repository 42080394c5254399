/*
 * A virtio balloon whose work is done by libaerostat: the memory balloon with
 * device ID 13 (docs/memballoon.md of the library)
 *
 * It has no configuration space. The monitor's target becomes a MIN_BALLOON
 * message to the guest, and the balloon's size is what its commands leave.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/module.h"
#include "qemu/units.h"
#include "hw/qdev-properties.h"
#include "standard-headers/linux/virtio_ids.h"
#include "aerostat-balloon.h"

/* On the fromdevq the device speaks, on the todevq the driver commands. */
enum { FROMDEVQ, TODEVQ, QUEUES };

/* Bit 1 stands for pages of 4 KiB, each bit above it for twice as much. */
static uint64_t memballoon_offered(AerostatBalloon *s)
{
    return (s->page_sizes / (4 * KiB) << 1 &
            AEROSTAT_MEMBALLOON_FEATURE_PAGE_SIZES) | s->features;
}

static unsigned int memballoon_served_here(AerostatBalloon *s)
{
    return 1u << TODEVQ;
}

/* A driver that selected no page size, or several, does not get FEATURES_OK. */
static int memballoon_validate_features(VirtIODevice *vdev)
{
    AerostatBalloon *s = AEROSTAT_BALLOON(vdev);
    uint64_t features = vdev->guest_features &
                        (AEROSTAT_MEMBALLOON_FEATURE_PAGE_SIZES |
                         AEROSTAT_MEMBALLOON_FEATURE_EXTRA_MEM |
                         AEROSTAT_MEMBALLOON_FEATURE_NODE);

    return aerostat_device_set_features(s->core.device, features);
}

static const Property memballoon_properties[] = {
    /* The sum of the sizes that are offered; all of them. */
    DEFINE_PROP_UINT64("page-sizes", AerostatBalloon, page_sizes,
                       32 * GiB - 4 * KiB),
    /* A target for each node of the guest. */
    DEFINE_PROP_BIT64("node", AerostatBalloon, features, 50, false),
};

static void memballoon_class_init(ObjectClass *klass, void *data)
{
    AerostatBalloonClass *abc = AEROSTAT_BALLOON_CLASS(klass);
    DeviceClass *dc = DEVICE_CLASS(klass);

    device_class_set_props(dc, memballoon_properties);
    dc->desc = "virtio memory balloon (device ID 13) served by libaerostat";
    VIRTIO_DEVICE_CLASS(klass)->validate_features = memballoon_validate_features;
    abc->kind = AEROSTAT_KIND_MEMBALLOON;
    abc->virtio_id = VIRTIO_ID_MEMORY_BALLOON;
    abc->queues = QUEUES;
    abc->offered = memballoon_offered;
    abc->served_here = memballoon_served_here;
}

/* A command has much to discard already: nothing is gained by waiting for more. */
static void memballoon_instance_init(Object *obj)
{
    AEROSTAT_BALLOON(obj)->core.write_behind_bytes = 0;
}

static const TypeInfo memballoon_info = {
    .name = TYPE_AEROSTAT_MEMBALLOON,
    .parent = TYPE_AEROSTAT_BALLOON,
    .instance_init = memballoon_instance_init,
    .class_init = memballoon_class_init,
};

static void memballoon_register_types(void)
{
    type_register_static(&memballoon_info);
}

type_init(memballoon_register_types)
